"""The worked example, from its data to compared lists, on made items of the same form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import run
from tests.integration.office_data import ROWS, prepare, script


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one epoch, imported."""
    out = tmp_path_factory.mktemp("out")
    prepare(out / "data", out)
    done = script("office/train_checkpoint.py", out, "--epochs", 1, "--hidden-size", 32, "--layers", 1)
    assert done.returncode == 0, done.stderr
    files = ("--index", out / "Office.index.json", "--histories", out / "questions.jsonl")
    imported = run("import", out / "checkpoint", *files, "--prompt", "minionerec", "--out", out / "bundle")
    assert imported.exit_code == 0, imported.output
    assert f"prompts equal the tokenizer's on {ROWS} of {ROWS} histories" in " ".join(imported.output.split())
    return out


def test_lists_of_the_imported_example_are_those_of_generate(out: Path) -> None:
    """With the scored line feed and end of text, on the authors' own prompts, at K = 5 in both modes."""
    asked = ("--checkpoint", out / "checkpoint", "--prompt", "minionerec", "--histories", out / "questions.jsonl")
    done = run("bench", "parity", "--bundle", out / "bundle", *asked, "--users", 10, "-k", 5, "--json", out / "p.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "p.json").read_text())["rows"]
    assert {(row["users"], row["different"], row["prompts_different"]) for row in rows} == {(10, 0, 0)}


def test_recall_counts_the_hits_of_served_lists(out: Path) -> None:
    """Item-kNN knows the made walks by their neighbours, and popularity does not."""
    done = script("office/recall.py", out, out / "bundle", "--questions", 20, "--json", out / "recall.json")
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads((out / "recall.json").read_text())}
    assert rows["item-kNN"]["recall"] == 1.0
    assert rows["popularity"]["recall"] < 0.5
    assert 1 <= rows["bundle"]["target_passes"] <= 5
    assert rows["bundle"]["asked_draft"] == 0.0


def test_passes_are_counted_by_plan(out: Path) -> None:
    """Plain beam search takes a pass for each of the five levels; target prefetch takes no more."""
    plans = ("--plan", "plain", "no draft", "-k", 5, "--questions", 10, "--json", out / "passes.json")
    done = script("office/passes.py", out, out / "bundle", out / "bundle", *plans)
    assert done.returncode == 0, done.stderr
    plain, prefetch = json.loads((out / "passes.json").read_text())
    assert (plain["target_passes"], plain["nodes"], plain["questions"]) == (5.0, 0.0, 10)
    assert 1 <= prefetch["target_passes"] <= 5
    assert prefetch["asked_draft"] == 0.0
