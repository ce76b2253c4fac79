"""`atspeed bench events`: each way stores the same events, and the result file has its rows."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from atspeed.cli import main
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue


def test_ways_to_record(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", random_catalogue(20, (4, 4), seed=1)).root
    command = ["bench", "events", "--bundle", bundle, "--events", 60, "--users", 5, "--batch", 25, "--concurrency", 3]
    done = CliRunner().invoke(main.app, [*map(str, command), "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["calls"], row["at_once"]) for row in result["rows"]] == [(60, 1), (60, 3), (3, 1), (3, 3)]
    assert all(row["events"] == 60 and row["per_second"] > 0 for row in result["rows"])
