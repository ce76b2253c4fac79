"""`research draft-kinds`: two kinds of drafts from a file to a page, and what a second run does again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.bundle.manifest import LANGUAGE_MODEL, LEVEL_HEADS
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.training.models import SpelledModel
from atspeed.training.sequences import Spelling
from atspeed.training.trainer import Trainer
from research import acceptance, draft_kinds, target_state
from research.__main__ import app
from tests.bundles import BOS, random_heads
from tests.catalogues import random_catalogue
from tests.recipes import short_recipe

ALIGNED = """
[draft.alignment]
loss = "level-kd"
weight = 1.0
beams = 5
budget = 10
prompts = 60
"""
KINDS = """
base = "tiny.toml"
seeds = [1, 2]
schedule = { epochs = 1 }

[[losses]]
name = "language-model"
alignment = { loss = "level-kd" }

[[losses]]
name = "heads"
alignment = { loss = "level-kd" }
draft = { heads = { size = 4 } }
"""
USERS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "tiny.toml").write_text(short_recipe(ALIGNED, target_epochs=1))
    (folder / "kinds.toml").write_text(KINDS)
    result = study(folder)
    assert result.exit_code == 0, result.output
    return folder


def study(folder: Path) -> Result:
    command = ["draft-kinds", str(folder / "kinds.toml"), "--run-folder", str(folder / "run"), "--timed", "2"]
    written = ["--json", str(folder / "result.json"), "--report", str(folder / "page")]
    return CliRunner().invoke(app, [*command, "--users", str(USERS), "--target-state", "4", *written])


def test_every_kind_is_counted_timed_and_exact(folder: Path) -> None:
    rows = json.loads((folder / "result.json").read_text())["rows"]
    drafts = {row["draft"]: row for row in rows if row["kind"] == draft_kinds.NAME}
    assert {name: row["draft_kind"] for name, row in drafts.items()} == {
        f"{kind}/seed{seed}": made
        for kind, made in (("language-model", LANGUAGE_MODEL), ("heads", LEVEL_HEADS))
        for seed in (1, 2)
    }
    assert {name.partition("/")[0]: row["draft_passes"] for name, row in drafts.items()} == {
        "language-model": 2,
        "heads": 1,
    }
    assert all(row["training_seconds"] > 0 and min(row["plan_ms"].values()) > 0 for row in drafts.values())
    counted = [row for row in rows if row["kind"] == acceptance.NAME and row["mode"] == "strict"]
    assert len(counted) == len(drafts) * 4 * 3
    assert all(row["identical"] + row["near_ties"] == USERS for row in counted)
    assert all(1 <= row["target_passes_mean"] <= 3 for row in counted)


def test_page_has_a_column_for_each_kind(folder: Path) -> None:
    page = (folder / "page" / "draft-kinds.md").read_text()
    assert "| K | nodes | no draft | language-model | heads |" in page
    assert f"{4 * 4 * 3 * USERS:,} identical" in page
    assert "±" in page


def test_heads_on_the_targets_state_take_two_passes_at_least(folder: Path) -> None:
    rows = json.loads((folder / "result.json").read_text())["rows"]
    found = [row for row in rows if row["kind"] == draft_kinds.TARGET_STATE]
    assert {(row["draft"], row["k"], row["nodes"]) for row in found} == {
        (f"target-state/seed{seed}", k, nodes)
        for seed in (1, 2)
        for k in draft_kinds.WIDTHS
        for nodes in draft_kinds.NODES
    }
    assert all(row["identical"] == USERS for row in found)
    assert all(2 <= row["target_passes_mean"] <= 3 for row in found)
    assert min(row["target_passes_mean"] for row in found) < 3
    page = (folder / "page" / "draft-kinds.md").read_text()
    assert "| target-state/seed2 |" in page


def test_second_run_trains_and_counts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((folder / "result.json").read_text())["rows"]
    monkeypatch.setattr(Trainer, "fit", lambda _: pytest.fail("trained again"))
    monkeypatch.setattr(acceptance, "run", lambda *_: pytest.fail("counted again"))
    assert study(folder).exit_code == 0
    after = json.loads((folder / "result.json").read_text())["rows"]
    assert [row for row in after if row["kind"] == acceptance.NAME] == [
        row for row in before if row["kind"] == acceptance.NAME
    ]


def test_target_of_other_tokens_gets_no_heads(tmp_path: Path) -> None:
    """Levels that share tokens have no head of their own."""
    catalogue = random_catalogue(30, (4, 4), seed=1)
    model = random_heads(catalogue, seed=1).trunk()
    tokens = (3, 5, 4, 6, 7, 8, 9, 10)
    spelling = Spelling(
        code_tokens=tokens, prompt=PromptTemplate(prefix=(BOS,), max_items=4), pad_token=0, vocab_size=11
    )
    SpelledModel(model, spelling).save(tmp_path / "target")
    with pytest.raises(BenchmarkError, match=r"--target-state: .*target: needs a decoder whose code tokens follow"):
        target_state.build(tmp_path / "target", catalogue, hidden=8, size=4, seed=1)
