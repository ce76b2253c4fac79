"""`atspeed bench batch`: the bare runner and both modes of a batch make all lists, and the result file has the rates."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from atspeed.cli import main
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue


def test_rates_of_a_batch_beside_the_bare_runner(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", random_catalogue(40, (6, 6), seed=1)).root
    command = ["bench", "batch", "--bundle", bundle, "--users", 6, "--turns", 2, "-k", 3, "--threads", 1]
    done = CliRunner().invoke(main.app, [*map(str, command), "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "rows.json").read_text())
    assert [row["way"] for row in result["rows"]] == [
        "bare runner, target-only",
        "atspeed batch, target-only",
        "atspeed batch, strict",
    ]
    for row in result["rows"]:
        assert len(row["per_second"]) == 2
        assert min(row["per_second"]) > 0
    assert result["rows"][0]["of_bare"] == 1
