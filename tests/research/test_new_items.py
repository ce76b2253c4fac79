"""`research new-items`: nothing of a held-out item reaches the training, and its users are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atspeed.engine.bundle.bundle import Bundle
from atspeed.training.data import read_atspeed
from research.__main__ import app
from research.new_items import frequent_part, without
from tests.kinds_of_items import recipe, write_data


def test_held_out_items_leave_no_trace(tmp_path: Path) -> None:
    dataset = read_atspeed(write_data(tmp_path / "data"))
    left = without(dataset, {"0", "9"})
    assert {item.id for item in left.items} == {str(n) for n in range(32)} - {"0", "9"}
    events = [item for split in (left.train, left.valid, left.test) for items in split.values() for item in items]
    assert not {"0", "9"} & set(events)
    for user, items in dataset.train.items():
        assert left.train.get(user, ()) == tuple(item for item in items if item not in {"0", "9"})
    assert len(frequent_part(dataset, 10).items) == 10
    assert frequent_part(dataset, None) is dataset


def test_a_study_of_a_small_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data")
    (tmp_path / "recipe.toml").write_text(recipe().partition("[draft.shape]")[0])
    command = ["new-items", "--data", data, "--run-folder", tmp_path / "run", "--recipe", tmp_path / "recipe.toml"]
    done = CliRunner().invoke(app, [*map(str, command), "--share", "0.25", "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "rows.json").read_text())
    new, old = result["rows"]
    assert (new["group"], old["group"]) == ("new", "old")
    assert new["users"] + old["users"] == 40  # each has one answer, and a history of its kind
    for row in (new, old):
        assert 0 <= row["recall"]["10"]["low"] <= row["recall"]["10"]["value"] <= row["recall"]["20"]["value"] <= 1
        assert 0 <= row["reached"] <= 1
        assert row["by_chance"]["20"] == 20 / 32
    assert Bundle(tmp_path / "run" / "run" / "bundle").catalogue().items == 24


def test_codes_must_be_quantised(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    command = ["new-items", "--data", str(data), "--run-folder", str(tmp_path / "run"), "--recipe", "runs/tiny.toml"]
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.output) == (
        1,
        "atspeed: runs/tiny.toml: codes.kind: given, but new items need quantised codes\n",
    )
