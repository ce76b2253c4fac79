"""Drafts trained by every loss, from a recipe to a bundle; what is done again when the alignment changes, and what is not."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.training import draft_stages, pipeline
from atspeed.training.errors import RecipeError
from atspeed.training.pipeline import load_dataset, train
from atspeed.training.recipe import AlignmentLoss, Recipe, read_recipe
from atspeed.training.run import Folders
from atspeed.training.semantic_ids import build_catalogue
from atspeed.training.teacher import Teacher, TeacherShard, TrainingPrompts, write_teacher_data
from tests.recipes import RUNS, TINY, fitted_titles, short_recipe

LOSSES: tuple[AlignmentLoss, ...] = get_args(AlignmentLoss)


def recipe(folder: Path, section: str) -> Recipe:
    """runs/tiny.toml on fewer users and epochs, with a section added."""
    path = folder / "tiny.toml"
    path.write_text(short_recipe(section))
    return read_recipe(path)


def aligned(folder: Path, **values: Any) -> Recipe:
    lines = [
        f"{name} = {json.dumps(value)}" for name, value in ({"beams": 5, "budget": 10, "prompts": 100} | values).items()
    ]
    return recipe(folder, "\n".join(["[draft.alignment]", *lines]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a draft without alignment."""
    folder = tmp_path_factory.mktemp("run")
    train(recipe(folder, ""), folder / "run", threads=1)
    return folder / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.mark.parametrize("loss", [*LOSSES, None])
def test_every_loss_trains_a_draft_and_reports_its_agreement(
    copied: Path, tmp_path: Path, loss: AlignmentLoss | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fitted_titles(monkeypatch)
    asked = aligned(tmp_path, **({"loss": loss} if loss else {}))
    bundle = Bundle(train(asked, copied, threads=1))
    bundle.verify()
    assert fitted == ["draft"]  # the target was there already
    log = json.loads((copied / "draft-log.json").read_text())
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    assert all(epoch["score"] == pytest.approx(epoch["accepted"] + epoch["covered"] / 1000) for epoch in log)
    assert 0 <= bundle.manifest.provenance.metrics["agreement.accepted"] <= 2
    assert '"alignment"' in bundle.manifest.provenance.recipe


def test_one_teacher_serves_all_losses(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(aligned(tmp_path, loss="word-kd"), copied, threads=1)
    monkeypatch.setattr(Teacher, "shard", lambda *_: pytest.fail("asked again"))
    fitted = fitted_titles(monkeypatch)
    train(aligned(tmp_path, loss="word-kd"), copied, threads=1)
    train(aligned(tmp_path, loss="tvd-kd", weight=0.5), copied, threads=1)
    assert fitted == ["draft"]


def test_changed_teacher_settings_make_the_teacher_data_again(copied: Path, tmp_path: Path) -> None:
    train(aligned(tmp_path, loss="word-kd", prompts=50), copied, threads=1)
    assert sum(len(TeacherShard.load(path)) for path in (copied / "teacher").iterdir()) == 50
    train(aligned(tmp_path, loss="word-kd", prompts=40), copied, threads=1)
    assert sum(len(TeacherShard.load(path)) for path in (copied / "teacher").iterdir()) == 40


def test_killed_while_the_teacher_answers_gives_the_same_bundle(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shard kills the run; the first is kept and not asked for again."""
    monkeypatch.setattr(draft_stages, "write_teacher_data", partial(write_teacher_data, shard=40))
    whole = Path(shutil.copytree(copied, tmp_path / "whole"))
    asked = aligned(tmp_path, loss="atspeed-s", prompts=100)
    expected = Bundle(train(asked, whole, threads=1)).manifest.version
    shard = Teacher.shard
    firsts: list[int] = []

    def dies(teacher: Teacher, prompts: TrainingPrompts, first: int, count: int) -> TeacherShard:
        firsts.append(first)
        if firsts == [0, 40]:
            raise KeyboardInterrupt
        return shard(teacher, prompts, first, count)

    monkeypatch.setattr(Teacher, "shard", dies)
    with pytest.raises(KeyboardInterrupt):
        train(asked, copied, threads=1)
    assert Bundle(train(asked, copied, threads=1)).manifest.version == expected
    assert firsts == [0, 40, 40, 80]


def test_recipes_without_alignment_keep_their_keys() -> None:
    """Keys as they were before there was an alignment: a changed one would train a finished run again.

    Whoever changes runs/tiny.toml itself writes down the new keys here.
    """
    dataset = load_dataset(TINY, None)
    run = pipeline.TrainingRun(TINY, Folders.one(Path("unused")), None, dataset)
    catalogue, _ = build_catalogue(dataset, TINY.codes, data=None, seed=TINY.seed)
    stages = run.draft_stages(catalogue)
    assert run.target_key(catalogue) == "57b8e5da7c51e664"
    assert stages is not None
    assert stages.key == "a35c0ae364bd022f"
    for path in (RUNS / f"{name}.toml" for name in ("tiny", "movielens-100k")):
        if (draft := read_recipe(path).draft) is not None and draft.alignment is None:
            assert list(draft.model_dump(mode="json")) == ["shape", "base", "schedule", "precision"]
            assert "alignment" not in read_recipe(path).model_dump_json()


def test_the_target_has_no_alignment(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"target\.alignment: Extra inputs are not permitted"):
        recipe(tmp_path, '[target.alignment]\nloss = "word-kd"')


def test_a_budget_below_the_beams_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"draft\.alignment: Value error, budget: 4 nodes cannot hold 5 beams"):
        aligned(tmp_path, loss="coverage", budget=4)


def test_an_unknown_loss_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"draft\.alignment\.loss: Input should be 'atspeed-s'"):
        aligned(tmp_path, loss="magic")
