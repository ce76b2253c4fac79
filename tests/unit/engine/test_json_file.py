"""JSON files hold numbers only, and appear whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NoReturn

import pytest

from atspeed.benchmarks.results import Result
from atspeed.engine.files.json_file import write_json


def strictly(path: Path) -> object:
    """Read as readers of the standard do: Python alone takes NaN."""

    def refuse(value: str) -> NoReturn:
        raise ValueError(value)

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_file_with_what_is_no_number_is_refused_by_its_place(value: float, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match=r"file\.json: rows\[1\]\.p50: -?(nan|inf) is no number"):
        write_json(path, {"rows": [{"p50": 1.0}, {"p50": value}]})
    assert strictly(path) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_a_result_keeps_its_numbers_where_others_are_none(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    rows = [{"p50": math.nan, "users": 3, "parts": {"draft": math.inf, "target": 2.5}, "sizes": (1.0, -math.inf)}]
    Result({"benchmark": "a"}, rows).write(path)
    kept = [{"p50": None, "users": 3, "parts": {"draft": None, "target": 2.5}, "sizes": [1.0, None]}]
    assert strictly(path) == {"header": {"benchmark": "a"}, "rows": kept}
    assert Result.read(path) == Result({"benchmark": "a"}, kept)
