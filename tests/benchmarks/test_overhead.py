"""`bench overhead` without services: the overhead of a request, and the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from atspeed.benchmarks import overhead
from atspeed.benchmarks.overhead import OverheadRow, RequestOverhead, summarise
from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import BenchmarkError, Result, to_json
from atspeed.benchmarks.services import ServiceOptions
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.search.mode import Mode
from atspeed_client import Recommendation
from atspeed_client.reading import to_recommendation
from atspeed_client.v1 import recommendation_pb2 as pb
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue


def reply(*, total: int = 28, extra: int = 0) -> Recommendation:
    """A reply whose target took 12 ms in its model and 15 in all, its draft 4 and 6. In ms."""
    stages = {"history": 2 + extra, "target": 15, "target_forward": 12, "draft": 6, "draft_forward": 4, "selection": 1}
    times = pb.StageTimes(**{f"{name}_ms": ms for name, ms in {**stages, "total": total + extra}.items()})
    return to_recommendation(pb.RecommendResponse(statistics=pb.Statistics(stage_times=times)), "")


def test_overhead_is_time_outside_of_the_models() -> None:
    added = RequestOverhead.of(reply(), caller_ms=30.0)
    assert (added.models_ms, added.added_ms) == (16.0, 14.0)
    assert added.parts == {"client": 2.0, "history": 2.0, "target": 3.0, "draft": 2.0, "selection": 1.0}


def test_row_has_medians_and_paired_differences() -> None:
    found = [RequestOverhead.of(reply(extra=extra), caller_ms=30.0 + extra) for extra in (0, 1, 10)]
    one = summarise(Mode.TARGET_ONLY, 5, found, [20.0, 26.0, 29.0])
    assert (one.users, one.p50_ms, one.models_p50_ms, one.added_p50_ms) == (3, 31.0, 16.0, 15.0)
    assert one.added_share == round(15 / 31, 3)
    assert (one.in_process_p50_ms, one.over_in_process_ms) == (26.0, 10.0)
    assert one.parts_ms["history"] == 3.0
    assert (one.library_p50_ms, one.library_added_ms) == (None, None)
    library = [RequestOverhead.of(reply(), caller_ms=ms) for ms in (18.0, 17.0, 30.0)]
    both = summarise(Mode.STRICT, 5, found, None, library)
    assert (both.library_p50_ms, both.library_added_ms) == (18.0, 2.0)
    assert summarise(Mode.STRICT, 5, found, None).over_in_process_ms is None


def test_page_is_written_from_result_file(tmp_path: Path) -> None:
    bundle = Bundle(write_bundle(tmp_path / "bundle", random_catalogue(20, (4, 4), seed=1)).root)
    rows = [
        summarise(
            mode,
            5,
            [RequestOverhead.of(reply(), 30.0)],
            [20.0] if mode is Mode.TARGET_ONLY else None,
            [RequestOverhead.of(reply(), 17.0)],
        )
        for mode in overhead.MODES
    ]
    about = overhead.header(ServiceOptions(threads=2), users=1, items=(3, 20), histories="train.txt")
    result = Result(provenance(bundle, seed=1) | about, to_json(rows))
    result.write(tmp_path / "overhead.json")
    assert Result.read(tmp_path / "overhead.json").rows_of("overhead", OverheadRow) == rows
    text = overhead.write(Result.read(tmp_path / "overhead.json"), tmp_path / "page").read_text()
    assert "| target-only | 5 | 30.0 | 16.0 | 14.0 | 14.0 | 47% | 20.0 | 10.0 | 17.0 | 1.0 |" in text
    assert "| strict | 5 | 2.0 | 2.0 | 3.0 | 2.0 | 1.0 |" in text
    assert "added by the library to the models' time, p50 | K = 5: 1.0 ms |" in text
    assert "1 users with 3 to 20 items, of train.txt" in text
    assert "the same search as a function call, p50 | K = 5: 10.0 ms |" in text
    with pytest.raises(BenchmarkError, match="not one of the benchmark overhead"):
        overhead.write(replace(result, header={**result.header, "benchmark": "load"}), tmp_path)
