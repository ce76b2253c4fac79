"""Result files: rows are read back by their types, and headers name the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from atspeed.benchmarks.intervals import Interval
from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import BenchmarkError, Result, to_json


@dataclass(frozen=True)
class SampleRow:
    """A row with a nested value and an optional one."""

    name: str
    interval: Interval
    count: int | None = None


ROWS = [SampleRow("a", Interval(1.0, 0.5, 1.5)), SampleRow("b", Interval(2.0, 1.5, 2.5), 3)]


@pytest.mark.parametrize("omit_none", [True, False])
def test_rows_survive_the_file(tmp_path: Path, omit_none: bool) -> None:
    Result({"benchmark": "sample"}, to_json(ROWS, omit_none=omit_none, kind="x")).write(tmp_path / "new" / "file.json")
    read = Result.read(tmp_path / "new" / "file.json")
    assert ("count" in read.rows[0]) == (not omit_none)
    assert read.rows_of("sample", SampleRow, kind="x") == ROWS
    assert read.rows_of("sample", SampleRow, kind="y") == []


@pytest.mark.parametrize(("benchmark", "problem"), [("other", "not one of the benchmark other"), ("sample", "count")])
def test_rows_of_another_shape_or_benchmark_are_refused(benchmark: str, problem: str) -> None:
    rows = [{"name": "a", "interval": {"value": 1, "low": 1, "high": 1}, "count": "many"}]
    with pytest.raises(BenchmarkError, match=problem):
        Result({"benchmark": "sample"}, rows).rows_of(benchmark, SampleRow)


def test_command_of_a_package_is_named_as_it_is_run() -> None:
    studies = provenance(None, command=["/somewhere/research/__main__.py", "acceptance"])
    assert studies["command"] == ["python", "-m", "research", "acceptance"]
    assert provenance(None, command=["/bin/atspeed", "bench"])["command"] == ["atspeed", "bench"]
