"""`atspeed bench batch` and `bench ray`: all lists are made, and the result file has the rates."""

from __future__ import annotations

import contextlib
import json
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atspeed.cli import main
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue

with contextlib.suppress(ImportError):  # here, since it sets hooks of this process, which a test must leave as they are
    import_module("ray.data")


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


def test_a_job_of_ray_needs_enough_histories(tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    catalogue = random_catalogue(40, (6, 6), seed=1)
    bundle = write_bundle(tmp_path / "bundle", catalogue).root
    histories = tmp_path / "histories.txt"
    histories.write_text(f"user {catalogue.id_of(0)} {catalogue.id_of(1)}\n")
    done = CliRunner().invoke(main.app, ["bench", "ray", "--bundle", str(bundle), "--histories", str(histories)])
    assert done.exit_code == 1
    assert "--users: 4096 histories are needed, and 1 were found" in done.output


@pytest.mark.long  # a cluster and three workers take a minute to start
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of Ray itself
def test_rates_of_a_job_of_ray_by_its_workers(tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    bundle = write_bundle(tmp_path / "bundle", random_catalogue(40, (6, 6), seed=1)).root
    command = ["bench", "ray", "--bundle", bundle, "--users", 2_048, "--turns", 1, "-k", 3]
    done = CliRunner().invoke(main.app, [*map(str, command), "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["workers"] for row in rows] == [1, 2]
    assert all(min(row["per_second"]) > 0 for row in rows)
