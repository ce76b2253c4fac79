"""Costs from result files and devices, and the comparison with a load result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atspeed.benchmarks.results import Result
from atspeed.capacity import roofline, sources
from atspeed.capacity.check import compare
from atspeed.capacity.errors import CapacityError
from atspeed.capacity.model import Costs
from atspeed.capacity.sources import Question, Speculation
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.training.inflation import SHAPES

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "benchmarks"
ASKED = Question(k=10, levels=4, computed=20.0, prefix_hit=0.75, plan_ms=4.0)
# 1 ms and 0.5 ms a token.
LINE = {"new_tokens": [1, 101], "cached_tokens": [0], "forward_ms": [[1.5], [51.5]]}


def load_result(**changed: Any) -> Result:
    """One replica of 10 lists a second on two cores, whose saturation was measured."""
    row = {"replicas": 1, "mode": "target-only", "offered_rps": 5.0, "achieved_rps": 5.0, "target_passes_mean": 4.0}
    row |= {"p99_ms": 400.0, "unloaded_p50_ms": 100.0}
    header = {"benchmark": "load", "k": 10, "threads": 1, "machine": {"cores": 2}}
    header |= {"bare": {"1": {"searches_per_second": 10.0}}}
    header |= {"saturated": {"1": {"target-only": {"searches_per_second": 8.0}}}}
    return Result(header | changed, [row])


def test_plain_beam_search_and_a_plan_cost_their_passes_on_a_curve() -> None:
    time = sources.host_time(sources.curve_of(LINE), 0)
    plain, strict = sources.curve_ways(time, ASKED, [Speculation("60", 1.25, 60.0, 1.2)])
    assert plain.together_ms == {1: pytest.approx(11.0 + 3 * 6.0)}
    assert plain.passes == 4
    assert strict.together_ms == {1: pytest.approx(1.25 * (1 + 0.5 * 64))}  # 80 tokens in 1.25 passes
    assert strict.draft_ms == pytest.approx(4.8)


def test_decode_mixes_cold_and_warm_lists_by_the_prefix_hits() -> None:
    result = Result.read(RESULTS / "decode.json")
    rows = {(row["mode"], row["prefix"]): row for row in result.rows if row["engine"] == "atspeed" and row["k"] == 10}
    plain, strict = sources.decode_ways(result, ASKED)
    for way in (plain, strict):
        warm, cold = (rows[way.name, prefix]["stages_ms"]["target_forward"] for prefix in ("warm", "cold"))
        assert way.together_ms[1] == pytest.approx(0.75 * warm + 0.25 * cold)
    assert strict.passes < plain.passes == 4


def test_acceptance_gives_every_measured_plan_of_the_k() -> None:
    found = {each.plan: each for each in sources.accepted_by_rows(Result.read(RESULTS / "acceptance.json"), 20)}
    assert set(found) == {"2k", "40", "120", "240"}
    assert found["240"].passes < found["120"].passes < found["2k"].passes < 4
    with pytest.raises(CapacityError, match=r"^k: the result file has lists of 1, 3, 5, 10, 20, not of 7$"):
        sources.accepted_by_rows(Result.read(RESULTS / "acceptance.json"), 7)


def test_a_manifest_of_agreement_is_a_plan_of_40_nodes_a_level() -> None:
    metrics = read_manifest(ROOT / "bundles" / "movielens-100k").provenance.metrics
    (plan,) = sources.accepted_by_agreement(metrics, 10, 3)
    assert plan.passes == pytest.approx(3 - metrics["agreement.accepted"])
    assert plan.nodes == 80
    assert sources.accepted_by_agreement(metrics, 20, 3) == [], "measured for the best 10"
    assert sources.accepted_by_agreement({}, 10, 3) == []


def test_lists_share_passes_of_a_device_up_to_its_largest_graph() -> None:
    time = sources.device_time(SHAPES["7b"], roofline.KERNELS["7b"], 1000)
    plain, strict = sources.curve_ways(time, ASKED, [Speculation("120", 1.2, 125.0, 1.2)])
    assert list(plain.together_ms) == [1, 2, 4, 8, 16]  # 20 tokens in graphs of 32
    assert list(strict.together_ms) == [1, 2, 4]  # 121 in graphs of 128
    one = roofline.Pass("7b", 1000, 20).seconds + 3 * roofline.Pass("7b", 1000, 10).seconds
    assert plain.together_ms[1] == pytest.approx(1e3 * one)
    for way in (plain, strict):
        busy = [ms / trees for trees, ms in way.together_ms.items()]
        assert busy == sorted(busy, reverse=True), "a shared pass never costs more for each list"


def test_a_prompt_beyond_the_graphs_runs_alone() -> None:
    time = sources.device_time(SHAPES["1.7b"], roofline.KERNELS["1.7b"], 1000)
    assert time(2, 600.0) is None
    alone = time(1, 600.0)
    assert alone == pytest.approx(1e3 * roofline.Pass("1.7b", 1000, 600, graph=False).seconds)


def test_the_shape_of_a_manifest_has_its_parameters() -> None:
    model = read_manifest(ROOT / "bundles" / "movielens-100k").target
    for name, heads in (("7b", 32), ("1.7b", 16)):
        shape = SHAPES[name]
        sized: dict[str, Any] = {"layers": shape.layers, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
        sized |= {"vocab_size": shape.vocab_size, "parameters": int(roofline.read_bytes(shape) / 2)}
        found = roofline.estimated_shape(model.model_copy(update=sized))
        assert found.heads == pytest.approx(heads, abs=1)
        assert roofline.read_bytes(found) == pytest.approx(roofline.read_bytes(shape), rel=0.1)


def test_a_load_result_is_compared_by_its_saturation_and_its_tail() -> None:
    saturation, tail = compare(load_result(), Costs(pass_ms=1.0, orchestrator_ms=6.0))
    assert (saturation.predicted, saturation.measured) == (10.0, 8.0)
    assert saturation.error == pytest.approx(0.25)
    # Half busy: jobs of 100 ms.
    assert tail.predicted == pytest.approx(100 + 100 * 1.05 * 3.912, rel=1e-3)
    assert tail.measured == 400


def test_two_replicas_of_a_full_host_are_limited_by_its_cores() -> None:
    result = load_result()
    two = Result(result.header, [{**result.rows[0], "replicas": 2}])
    (saturation, _) = compare(two, Costs(pass_ms=1.0, orchestrator_ms=6.0))
    assert saturation.predicted == pytest.approx(2 * 1e3 / (100 + 4 + 6))
    assert saturation.measured == 5.0, "the highest rate, without a closed loop"


@pytest.mark.parametrize("folder", ["", "int8"])
def test_the_published_load_results_saturate_within_15_percent_of_the_model(folder: str) -> None:
    rows = compare(Result.read(RESULTS / folder / "load.json"), Costs())
    errors = {row.replicas: row.error for row in rows if row.figure == "saturation"}
    assert set(errors) == {1, 2}
    assert all(abs(error) < 0.15 for error in errors.values()), errors


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"benchmark": "decode"}, "not a result of bench load"),
        ({"bare": {}}, "bare: "),
        ({"bare": {"1": {"searches_per_second": 0}}}, "bare.1.searches_per_second: "),
        ({"threads": None}, "another format"),
        ({"machine": {}}, "'cores'"),
    ],
)
def test_a_load_result_without_a_field_is_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(CapacityError, match=named):
        compare(load_result(**changed), Costs())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"new_tokens": None}, "not a cost curve"),
        ({"new_tokens": [2, 1]}, "new_tokens: must be ascending"),
        ({"forward_ms": [[1.0]]}, "not a cost curve"),
        ({"forward_ms": [[2.0], [1.0]]}, "forward_ns: must not fall"),
        ({"cached_tokens": "many"}, "not a cost curve"),
    ],
)
def test_a_wrong_curve_is_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(CapacityError, match=named):
        sources.curve_of(LINE | changed)
    missing = {name: value for name, value in LINE.items() if name not in changed}
    with pytest.raises(CapacityError, match=rf"^{next(iter(changed))}: missing"):
        sources.curve_of(missing)


def test_precision_has_the_curve_of_the_targets_number_format() -> None:
    result = Result.read(RESULTS / "precision.json")
    rows = json.loads((RESULTS / "precision.json").read_text(encoding="utf-8"))["rows"]
    measured = {row["precision"]: row["pass_ms"] for row in rows}
    time = sources.host_time(sources.precision_curve(result, "int8"), 0)
    assert time(1, 20.0) == pytest.approx(measured["int8"]["20"])
    assert time(2, 20.0) is None
    with pytest.raises(CapacityError, match=r"^precision: the result has float32, float16, int8"):
        sources.precision_curve(result, "bfloat16")
