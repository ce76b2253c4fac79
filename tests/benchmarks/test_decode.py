"""`bench decode` without services: comparisons between variants, and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from atspeed.benchmarks import decode_report
from atspeed.benchmarks.decode_rows import (
    ENGINE,
    HUGGING_FACE,
    NAME,
    ORACLE_PLAN,
    DecodeRow,
    ListSample,
    Prefix,
    Samples,
    Variant,
    summary,
    table,
)
from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import BenchmarkError, Result, to_json
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Mode
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue

STAGES = dict.fromkeys(("history", "draft", "draft_forward", "target", "target_forward", "selection", "total"), 1.0)


def samples(
    ms: list[float], items: str = "ab", *, passes: int = 4, stages: Mapping[str, float] = STAGES
) -> list[ListSample]:
    """Lists of one user after the other, all of the same items."""
    ranked = RankedList(tuple(items), tuple(-float(place) for place in range(len(items))))
    return [ListSample(time, ranked, passes, prompt_tokens=20, cached_tokens=16, stages_ms=stages) for time in ms]


def variant(mode: str, prefix: Prefix = Prefix.WARM, *, k: int = 5, engine: str = ENGINE) -> Variant:
    return Variant(engine, mode, k, prefix)


def measured() -> Samples:
    return {
        variant("target-only"): samples([40.0, 60.0, 50.0]),
        variant("target-only", Prefix.COLD): samples([100.0, 120.0, 110.0]),
        variant("strict"): samples([20.0, 25.0, 30.0], passes=1),
        variant(ORACLE_PLAN): samples([10.0, 10.0, 10.0], passes=1),
        variant("tolerance"): samples([10.0, 10.0, 10.0], "a"),
        variant("relaxed-sampling"): samples([10.0, 10.0, 10.0], "xy"),
        variant("exact-sampling"): samples([30.0, 30.0, 30.0], "cd"),
        variant("exact-sampling", Prefix.COLD): samples([60.0, 60.0, 60.0], "cd"),
        variant("constrained", Prefix.COLD, engine=HUGGING_FACE): samples([1000.0, 3000.0], stages={}),
        variant("unconstrained", Prefix.COLD, engine="other"): [ListSample(500.0, None, 4), ListSample(500.0, None, 4)],
    }


def rows() -> dict[tuple[str, str], DecodeRow]:
    return {(row.name, row.prefix): row for row in summary(measured())}


def test_speedups_are_of_medians_over_the_same_users() -> None:
    found = rows()
    assert found["strict", "warm"].speedup_vs_target_only == 2.0
    assert found["exact-sampling", "cold"].speedup_vs_target_only == round(110 / 60, 3)
    # Two users were asked of Hugging Face, whose median is 2000 ms; ours over the same two is 22.5 ms.
    assert found["strict", "warm"].speedup_vs_hf == round(2000 / 22.5, 3)
    assert found[HUGGING_FACE, "cold"].speedup_vs_target_only == round(110 / 2000, 3)
    assert found[HUGGING_FACE, "cold"].speedup_vs_hf == 1.0
    assert found["other", "cold"].speedup_vs_hf == 4.0


def test_lists_are_compared_with_their_reference() -> None:
    found = rows()
    counts = {key: (row.identical, row.near_ties, row.different) for key, row in found.items()}
    assert counts["strict", "warm"] == (3, 0, 0)
    assert counts["target-only", "warm"] == (3, 0, 0)
    assert counts["target-only", "cold"] == (None, None, None)  # it is the reference
    assert counts["tolerance", "warm"] == (0, 0, 3)
    assert counts["relaxed-sampling", "warm"] == (None, None, None)
    assert counts["exact-sampling", "warm"] == (3, 0, 0)  # with its own cold list, not with the beam search's
    assert counts["exact-sampling", "cold"] == (None, None, None)
    assert counts[HUGGING_FACE, "cold"] == (2, 0, 0)
    assert counts["other", "cold"] == (None, None, None)
    assert {row.mode for row in found.values() if not row.promises_identity} == {"tolerance", "relaxed-sampling"}


def test_without_target_only_nothing_is_compared() -> None:
    [row] = summary({variant("strict"): samples([1.0])})
    assert (row.speedup_vs_target_only, row.speedup_vs_hf, row.identical) == (None, None, None)


def test_percentiles_and_means_of_a_row() -> None:
    row = rows()["strict", "warm"]
    assert (row.users, row.p50_ms, row.p99_ms, row.target_passes_mean) == (3, 25.0, 29.9, 1.0)
    assert (row.prompt_tokens_mean, row.cached_tokens_mean, row.stages_ms["target"]) == (20, 16, 1.0)


def test_prediction_errors_count_predicted_requests_only() -> None:
    """Predictions for the target are 10 and 30 % off; there are none for the draft."""
    [first, second, third] = samples([1.0, 2.0, 3.0], stages={**STAGES, "target_forward": 10.0})
    found = [
        replace(first, predicted_ms={"target": 11.0}, expected_passes=1.5),
        replace(second, predicted_ms={"target": 7.0}, expected_passes=2.5),
        third,
    ]
    [row] = summary({variant("strict"): found})
    assert row.prediction_error == {"target": 0.2}
    assert row.expected_passes_mean == 2.0


@pytest.fixture
def result(tmp_path: Path) -> Result:
    bundle = Bundle(write_bundle(tmp_path / "bundle", random_catalogue(20, (4, 4), seed=1)).root)
    asked = {"users": 3, "items": (2, None), "histories": "train.txt", "peer_users": 2, "threads": 2, "provider": "cpu"}
    asked |= {"planner": "adaptive", "settle": 1}
    peers = {"peers": {HUGGING_FACE: "generate", "other": "a search"}}
    return Result(
        provenance(bundle, seed=1, command=["/bin/atspeed", "bench"]) | {"benchmark": NAME, **asked, **peers},
        to_json(summary(measured())),
    )


def test_page_is_written_from_result_file(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path / "decode.json")
    read = Result.read(tmp_path / "decode.json")
    assert read.rows_of(NAME, DecodeRow) == summary(measured())
    page = decode_report.write(read, tmp_path / "page")
    text = page.read_text()
    assert "| strict | 25.0 / 29.9, **2.00x**, 1.00 |" in text
    assert "| transformers | 2000.0 / 2980.0, **0.06x**, 4.00 |" in text
    assert "| strict | 88.9x |" in text
    assert "| tolerance | 0 | 0 | 3 |" in text
    assert "| 5 | 50.0 | 25.0 | 10.0 | 2.00x | 5.00x | 62% |" in text
    assert "| strict against target-only, warm prefix, p50 | K = 5: 2.00x |" in text
    assert "| strict against target-only, the least of these | 2.00x, at K = 5, warm |" in text
    assert "3 users with 2 items or more, of train.txt" in text
    assert "inflated" not in text
    plots = {path.name: path.read_bytes() for path in page.parent.glob("*.svg")}
    assert set(plots) == {"decode-time.svg", "decode-speedup.svg"}
    decode_report.write(read, tmp_path / "page")
    assert plots == {path.name: path.read_bytes() for path in page.parent.glob("*.svg")}


def test_page_names_inflated_models(result: Result, tmp_path: Path) -> None:
    header = {**result.header, "bundle": {**result.header["bundle"], "inflated_from": {"target": 1234}}}
    text = decode_report.write(replace(result, header=header), tmp_path).read_text()
    assert text.startswith("# Time of a list: random, inflated")
    assert "*inflated*: computes what 1,234 trained parameters compute" in text


def test_result_of_another_benchmark_is_refused(result: Result) -> None:
    with pytest.raises(BenchmarkError, match="not one of the benchmark decode"):
        replace(result, header={**result.header, "benchmark": "load"}).rows_of(NAME, DecodeRow)


def test_table_has_every_variant() -> None:
    shown = table(summary(measured()))
    assert sum(part.row_count for part in shown.renderables) == len(measured())  # type: ignore[union-attr]
    assert {Mode.STRICT.value, "other"} <= {row.name for row in summary(measured())}
