"""`atspeed plan`: what it prints, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atspeed.benchmarks.results import Result
from tests.command_line import ROOT, one_line, run

BUNDLE = ROOT / "bundles" / "movielens-100k"
RESULTS = ROOT / "docs" / "benchmarks"
ASKED = ("plan", BUNDLE, "--rate", "100", "--p99", "400")
DEVICE = ("--device", "h200")


def test_a_plan_names_replicas_redis_limits_and_the_origin_of_its_times() -> None:
    result = run(*ASKED, "--curve", RESULTS / "decode.json", "--users", "1000000", "--prefix-hit", "0.7", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    target, orchestrator = plan["stations"]
    assert (target["service"], orchestrator["service"]) == ("target", "orchestrator")
    assert target["replicas"] * 1e3 / target["busy_ms"] > 100
    assert target["cores"] > 2, "decode was measured with two threads"
    assert plan["redis"]["kv_gib"] > plan["redis"]["histories_gib"] > 0
    assert plan["p99_ms"] <= 400
    measured = Result.read(RESULTS / "decode.json").header["bundle"]["name"]
    assert f"of another bundle: {measured}" in plan["origin"][0]


def test_a_plan_for_a_device_says_that_it_is_arithmetic() -> None:
    result = run(*ASKED, *DEVICE, "--size", "7b", "--acceptance", RESULTS / "acceptance.json", "--items", 10**8)
    assert result.exit_code == 0, result.output
    assert "arithmetic for an H200, not measured" in result.stdout
    for row in ("target", "draft", "orchestrator", "mode: strict", "limit: "):
        assert row in result.stdout


def test_the_manifests_agreement_is_enough_for_a_plan_with_the_draft() -> None:
    plan = json.loads(run("plan", BUNDLE, "--rate", "2000", "--p99", "50", *DEVICE, "--json").stdout)
    assert "by the manifest" in plan["way"]
    assert plan["redis"] is None, "no users, no Redis"


def test_a_cost_curve_is_read_from_json(tmp_path: Path) -> None:
    curve = tmp_path / "curve.json"
    content = {"new_tokens": [1, 64], "cached_tokens": [0, 40], "forward_ms": [[2.0, 2.5], [20.0, 21.0]]}
    curve.write_text(json.dumps(content), encoding="utf-8")
    plan = json.loads(run(*ASKED, "--curve", curve, "--json").stdout)
    assert plan["stations"][0]["busy_ms"] > 2
    assert plan["stations"][0]["cores"] < 2, "one thread where the file names none"


def test_the_comparison_has_predicted_measured_and_the_error() -> None:
    rows = json.loads(run("plan", "--check", RESULTS / "load.json", "--json").stdout)
    both = {row["replicas"]: row for row in rows if row["figure"] == "saturation"}
    for row in both.values():
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    shown = run("plan", "--check", RESULTS / "load.json")
    assert f"{both[2]['predicted']:.1f}" in shown.stdout
    assert f"{both[2]['error']:+.0%}" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("plan", "--rate", "5", "--p99", "50"), 2, "BUNDLE: missing"),
        (("plan", BUNDLE, "--p99", "50"), 2, "--rate: missing"),
        (("plan", BUNDLE, "--rate", "5"), 2, "--p99: missing"),
        (("plan", BUNDLE, "--rate", "0", "--p99", "50"), 2, "--rate"),
        ((*ASKED, "--prefix-hit", "1.5", *DEVICE), 2, "--prefix-hit"),
        (ASKED, 2, "--curve or --device: give one"),
        ((*ASKED, *DEVICE, "--curve", RESULTS / "load.json"), 2, "--curve or --device: give one"),
        ((*ASKED, "--size", "7b", "--curve", RESULTS / "load.json"), 2, "--size: needs --device"),
        ((*ASKED, "--curve", ROOT / "README.md"), 1, "README.md: not JSON"),
        ((*ASKED, "--curve", RESULTS / "prefix.json"), 1, "prefix.json: a result of prefix, not of load"),
        ((*ASKED, "--curve", RESULTS / "load.json", "-k", "7"), 1, "load.json: k: "),
        ((*ASKED, *DEVICE, "--acceptance", RESULTS / "load.json"), 1, "load.json: a result of load"),
        (("plan", BUNDLE, "--rate", "5", "--p99", "5", "--curve", RESULTS / "load.json"), 1, "p99: 5 ms is below"),
        (("plan", "--check", RESULTS / "decode.json"), 1, "decode.json: a result of decode, not of load"),
        (("plan", BUNDLE, "--check", RESULTS / "load.json"), 2, "--check: stands without"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments: tuple[object, ...], code: int, named: str) -> None:
    assert named in one_line(run(*arguments), code)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"header": 1}', '{"header": {"benchmark": "load"}, "rows": [{}]}', "{}"]
)
def test_a_damaged_curve_is_one_line(content: str, tmp_path: Path) -> None:
    curve = tmp_path / "curve.json"
    curve.write_text(content, encoding="utf-8")
    assert "curve.json: " in one_line(run(*ASKED, "--curve", curve), 1)


@pytest.mark.parametrize("benchmark", ["decode", "load", "precision"])
@pytest.mark.parametrize("row", [{}, {"k": 10}, {"k": [10], "mode": "strict", "engine": "atspeed"}, {"precision": {}}])
def test_a_result_of_another_format_is_one_line(benchmark: str, row: dict[str, object], tmp_path: Path) -> None:
    curve = tmp_path / "result.json"
    curve.write_text(json.dumps({"header": {"benchmark": benchmark, "k": 10}, "rows": [row]}), encoding="utf-8")
    assert "result.json: " in one_line(run(*ASKED, "--curve", curve), 1)
    assert "result.json: " in one_line(run("plan", "--check", curve), 1)


def test_a_number_that_cannot_be_is_named_with_its_field(tmp_path: Path) -> None:
    rows = [{"mode": "strict", "draft": "draft", "k": 10, "target_passes_mean": 0.5}]
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"header": {"benchmark": "acceptance"}, "rows": rows}), encoding="utf-8")
    message = one_line(run(*ASKED, *DEVICE, "--acceptance", result), 1)
    assert "result.json: target_passes_mean: 0.5" in message
