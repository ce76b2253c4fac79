"""docs/capacity.md: its examples and errors are those of the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atspeed.benchmarks.results import Result
from atspeed.capacity.check import compare
from atspeed.capacity.model import Costs
from tests.command_line import ROOT, run

PAGE = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
GPU = ("--device", "h200", "--acceptance", "docs/benchmarks/acceptance.json", "--items", "100000000", "--p99", "100")


def stations(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    monkeypatch.chdir(ROOT)
    result = run("plan", "bundles/movielens-100k", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return {each["service"]: each for each in json.loads(result.stdout)["stations"]}


@pytest.mark.parametrize(("name", "folder"), [("float32", "."), ("int8", "int8")])
def test_errors_of_saturation(name: str, folder: str) -> None:
    for row in compare(Result.read(Path(ROOT / "docs" / "benchmarks" / folder / "load.json")), Costs()):
        if row.figure == "saturation":
            error = f"{row.error:+.0%}".replace("%", " %")
            assert f"| 85M {name} | {row.replicas} | {row.predicted:.1f} | {row.measured:.1f} | {error} |" in PAGE


def test_example_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    command = PAGE.partition("atspeed plan bundles/movielens-100k ")[2].partition("```")[0].replace("\\\n", " ")
    found = stations(*command.split(), monkeypatch=monkeypatch)
    assert found["orchestrator"]["replicas"] == 2
    target = found["target"]
    assert f"| {target['replicas']}: u = {target['utilisation']:.3f}, W = " in PAGE
    assert f"= {target['wait_p99_ms']:.0f} ms |" in PAGE


def test_first_example_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--rate", "2000", "-k", "20", "--size", "7b", "--prompt-tokens", "1000", "--prefix-hit", "0.9")
    for service, each in stations(*asked, *GPU, monkeypatch=monkeypatch).items():
        place = ", a GPU each" if service == "target" else ""
        sizes = f"{each['cores']:.1f} | {each['memory_gib']:.1f} | {each['busy_ms']:.1f}"
        assert f"| {service} | {each['replicas']}{place} | {sizes} | {each['utilisation'] * 100:.0f} % |" in PAGE


def test_second_example_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--rate", "100000", "-k", "10", "--size", "1.7b", "--prompt-tokens", "200", "--users", "100000000")
    for service, each in stations(*asked, *GPU, monkeypatch=monkeypatch).items():
        place = ", a GPU each" if service == "target" else ""
        sizes = f"{each['cores']:.1f} | {each['memory_gib']:.1f}"
        assert f"| {service} | {each['replicas']}{place} | {sizes} | {each['utilisation'] * 100:.0f} % |" in PAGE
