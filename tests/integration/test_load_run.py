"""`atspeed bench load` with the real services and the in-process baseline."""

from __future__ import annotations

from pathlib import Path

import pytest

from atspeed.benchmarks import load
from atspeed.benchmarks.arrivals import Mix, UserKind
from atspeed.benchmarks.histories import choose_histories
from atspeed.engine.bundle.bundle import Bundle


async def test_both_modes_get_the_same_load(bundle: Path) -> None:
    """All requests are counted, and returning users find their prefix."""
    histories = choose_histories(Bundle(bundle).catalogue(), None, 30, 1)
    config = load.LoadConfig(
        k=5, mix=Mix(0.2, 0.3, 0.5), seconds=1.0, settle=0.2, seed=1, replicas=(1,), rates=(30.0,), unloaded=3, bare=6
    )
    found = await load.run(bundle, histories, config)
    assert found.baseline[1].searches_per_second > 0
    assert [row.mode for row in found.rows] == ["target-only", "strict"]
    for row in found.rows:
        assert row.requests > 0
        assert not row.errors
        assert row.p50_ms is not None
        assert set(row.p50_ms_by_kind) == set(UserKind)
        assert 1 <= row.target_passes_mean <= 4
        assert row.memory_hit_share > 0
        assert row.generator_cpu_share > 0
    plain, strict = found.rows
    assert plain.requests == strict.requests
    assert plain.target_passes_mean == 4.0
    assert strict.limit_ms == plain.limit_ms == pytest.approx(load.LIMIT_FACTOR * plain.unloaded_p50_ms, abs=0.01)
    for loop in found.saturated[1].values():
        assert loop.searches == 6
        assert loop.searches_per_second > 0
    assert list(found.saturated[1]) == list(load.MODES)
