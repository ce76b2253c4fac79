"""`research graph-times`: two bundles in turn, from the command to its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from research.__main__ import app
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"), random_catalogue(60, (5, 4, 4), seed=1)).bundle.root


def run(*arguments: str | int | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["graph-times", *map(str, arguments)])
    return result.exit_code, result.output + str(result.exception or "")


def test_every_pass_and_list_has_a_row_and_a_line_of_the_page(bundle: Path, tmp_path: Path) -> None:
    code, output = run(
        *("--bundle", bundle, "--second", bundle, "--users", 2, "--cached", 3, "--passes", 2, "--k", 4),
        *("--json", tmp_path / "times.json", "--report", tmp_path),
    )
    assert code == 0, output
    result = json.loads((tmp_path / "times.json").read_text())
    rows = result["rows"]
    assert [row["what"] for row in rows] == [
        *(f"pass of {new} behind 3" for new in (1, 2, 10, 40, 80, 120)),
        *(f"{mode} list, K = 4" for mode in ("target-only", "strict")),
    ]
    assert {row["count"] for row in rows} == {2}
    assert len(set(result["header"]["compared"])) == 1
    page = (tmp_path / "graph-times.md").read_text()
    assert all(f"| {row['what']} | 1 | 2 |" in page for row in rows)


def test_other_catalogue_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", random_catalogue(60, (5, 4, 4), seed=2)).bundle.root
    code, output = run("--bundle", bundle, "--second", other)
    assert code != 0
    assert "different catalogues" in output


def test_too_many_cached_tokens_are_refused_by_name(bundle: Path) -> None:
    code, output = run("--bundle", bundle, "--second", bundle, "--cached", 4_000)
    assert code != 0
    assert "--cached" in output
