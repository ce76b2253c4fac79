"""`atspeed bench prefix` on a small bundle and a real Redis."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from atspeed.benchmarks import prefix
from atspeed.benchmarks.intervals import Interval
from atspeed.benchmarks.prefix import PrefixConfig, PrefixRow, PrefixState
from atspeed.benchmarks.results import BenchmarkError, Result, terminal_table
from atspeed.cli.bench.speed import bench_prefix
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from tests.bundles import random_history
from tests.serving import LEVELS, WINDOW


@pytest.fixture(scope="module")
def histories(catalogue: Catalogue) -> list[list[str]]:
    return [random_history(catalogue, items, seed=7000 + items) for items in (2, 5, WINDOW)]


async def rows_of(bundle: Path, histories: list[list[str]], config: PrefixConfig) -> dict[str, PrefixRow]:
    """Return the rows of the last number of nodes, by state."""
    rows = await prefix.run(Bundle(bundle), histories, config)
    assert [row.nodes for row in rows] == [nodes for nodes in config.nodes for _ in PrefixState]
    return {row.state: row for row in rows}


async def test_state_computes_tokens_that_its_tier_lacks(bundle: Path, histories: list[list[str]]) -> None:
    """Prompts of 2, 5 and 8 items of four codes, a token before and one after: blocks end one token after an item's end."""
    rows = await rows_of(bundle, [*histories, ["item-1"]], PrefixConfig(nodes=(0, 20)))
    lengths = [2 + LEVELS * items for items in (2, 5, WINDOW)]
    mean = sum(lengths) / 3
    assert {row.users for row in rows.values()} == {3}
    assert (
        rows[PrefixState.COLD].computed_tokens == rows[PrefixState.COLD].prompt_tokens == pytest.approx(mean, abs=0.01)
    )
    assert rows[PrefixState.MEMORY].computed_tokens == rows[PrefixState.REDIS].computed_tokens == 2
    assert (
        rows[PrefixState.MEMORY].memory_tokens
        == rows[PrefixState.REDIS].redis_tokens
        == pytest.approx(mean - 2, abs=0.01)
    )
    assert (rows[PrefixState.NEW_ITEM].computed_tokens, rows[PrefixState.NEW_ITEM].redis_tokens) == (1 + LEVELS + 1, 0)
    assert all(row.is_same for row in rows.values())


async def test_draft_and_other_block_sizes_are_measured(bundle: Path, histories: list[list[str]]) -> None:
    rows = await rows_of(bundle, histories[-1:], PrefixConfig(role="draft", nodes=(0,), block_tokens=16))
    assert (rows[PrefixState.MEMORY].role, rows[PrefixState.MEMORY].memory_tokens) == ("draft", 32)


def test_command_writes_result_and_refuses_short_histories(bundle: Path, tmp_path: Path, catalogue: Catalogue) -> None:
    lines = tmp_path / "histories.txt"
    lines.write_text(f"u1 {' '.join(random_history(catalogue, 3, seed=1))}\nu2 item-1\n")
    bench_prefix(bundle, histories=lines, nodes=[4], json_file=tmp_path / "result.json", report=tmp_path)
    result = Result.read(tmp_path / "result.json")
    page = (tmp_path / "prefix.md").read_text()
    assert "1 users with 2 items or more, of histories.txt" in page
    assert (
        f"against a cold prefix, 4 nodes | {result.rows_of(prefix.NAME, PrefixRow)[-1].speedup_vs_cold.value:.2f}x |"
        in page
    )
    assert result.header["benchmark"] == "prefix"
    assert [row["state"] for row in result.rows] == [state.value for state in PrefixState]
    assert {row["users"] for row in result.rows} == {1}
    lines.write_text("u2 item-1\n")
    with pytest.raises(BenchmarkError, match="no user with 2 or more items"):
        bench_prefix(bundle, histories=lines)


def test_difference_beyond_rounding_is_detected() -> None:
    def row(difference: float) -> PrefixRow:
        interval = Interval(1.0, 1.0, 1.0)
        return PrefixRow("target", 0, PrefixState.COLD, 1, 1.0, 1.0, 1.0, 0.0, 0.0, 0, interval, difference)

    assert row(prefix.TOLERANCE / 2).is_same
    assert not row(2 * prefix.TOLERANCE).is_same
    assert not row(float("inf")).is_same
    console = Console(width=200, record=True)
    console.print(terminal_table("", prefix.TERMINAL_COLUMNS, [row(0.0)]))
    assert "1.00 to 1.00" in console.export_text()
