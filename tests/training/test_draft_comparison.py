"""Drafts by several losses and seeds: what they share, what they do not, what is done again, and files that are refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.compared_drafts import train_drafts
from atspeed.training.comparison import read_comparison
from atspeed.training.errors import Paused, RecipeError
from atspeed.training.models import build_model
from atspeed.training.pipeline import train
from atspeed.training.teacher import Teacher
from atspeed.training.trainer import Trainer
from research.acceptance import draft_bundles
from tests.catalogues import random_catalogue
from tests.recipes import RUNS, fitted_titles, short_recipe

NAMES = ("none/seed1", "none/seed2", "word-kd/seed1", "word-kd/seed2")
ALIGNED = """
[draft.pretraining]
epochs = 1
batch_size = 16

[draft.alignment]
loss = "level-kd"
beams = 5
budget = 10
prompts = 60
"""
COMPARISON = """
base = "tiny.toml"
seeds = [1, 2]
schedule = { epochs = 1 }

[[losses]]
name = "none"
alignment = { loss = "none" }

[[losses]]
name = "word-kd"
alignment = { loss = "word-kd", weight = 0.5 }
"""


def write(folder: Path, comparison: str = COMPARISON, aligned: str = ALIGNED) -> Path:
    """A comparison, and its base beside it: runs/tiny.toml on few users and epochs."""
    (folder / "tiny.toml").write_text(short_recipe(aligned, target_epochs=1))
    path = folder / "losses.toml"
    path.write_text(comparison)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the base recipe's bundle and the drafts; the comparison stands beside it."""
    folder = tmp_path_factory.mktemp("compared")
    path = write(folder)
    with pytest.MonkeyPatch.context() as patch:
        fitted = fitted_titles(patch)
        train(read_comparison(path).base, folder / "run", threads=1)
        patch.setattr(Teacher, "shard", lambda *_: pytest.fail("asked again"))
        found = train_drafts(read_comparison(path), folder / "run")
    assert fitted[:3] == ["target", "pretrained-draft", "draft"]
    assert fitted[3:] == [
        "none-seed1 pretrained-draft",
        "none-seed1 draft",
        "none-seed2 pretrained-draft",
        "none-seed2 draft",
        "word-kd-seed1 draft",
        "word-kd-seed2 draft",
    ]
    assert tuple(found.bundles) == NAMES
    assert not found.candidates
    return folder / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def drafts(run: Path) -> dict[str, Bundle]:
    """The bundles by name."""
    return {name: Bundle(run / "drafts" / name.replace("/", "-") / "bundle") for name in NAMES}


def versions(run: Path) -> list[str]:
    """Versions of the drafts' bundles."""
    return [bundle.manifest.version for bundle in drafts(run).values()]


def test_the_drafts_share_the_target_and_nothing_else(run: Path) -> None:
    base, found = Bundle(run / "bundle"), drafts(run)
    for bundle in found.values():
        bundle.verify()
        assert bundle.manifest.target == base.manifest.target
        assert bundle.manifest.model_version("target") == base.manifest.model_version("target")
        assert bundle.model("draft").plan_scale is not None
    assert len({bundle.model("draft").fingerprint for bundle in [base, *found.values()]}) == 5


def test_the_target_is_exported_once(run: Path) -> None:
    alone = Bundle(run / "drafts" / "target" / "bundle")
    alone.verify()
    assert alone.manifest.draft is None
    for bundle in drafts(run).values():
        assert bundle.model_path("target").samefile(alone.model_path("target"))


def test_trained_drafts_are_accepted_by_the_benchmark(run: Path) -> None:
    options = [f"{name}={bundle.root}" for name, bundle in drafts(run).items()]
    assert tuple(draft_bundles(Bundle(run / "drafts" / "target" / "bundle"), "draft", options)) == NAMES


def test_the_drafts_of_a_seed_begin_alike_and_take_equal_steps(run: Path) -> None:
    assert sorted(path.name for path in (run / "drafts").glob("seed*")) == ["seed1", "seed2"]
    for name in NAMES:
        recipe = json.loads((run / "drafts" / name.replace("/", "-") / "recipe.json").read_text())
        assert recipe["draft"]["schedule"]["epochs"] == 1
        assert recipe["draft"]["seed"] == int(name[-1])
        assert recipe["draft"]["alignment"]["weight"] == (0.5 if name.startswith("word-kd") else 0.7)


def test_killed_draft_is_resumed_and_finished_ones_stay(
    run: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copied / "drafts" / "word-kd-seed1")
    comparison, save = read_comparison(run.parent / "losses.toml"), Trainer._save_state

    def dies(trainer: Trainer[Any], *rest: Any) -> None:
        save(trainer, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_state", dies)
        with pytest.raises(KeyboardInterrupt):
            train_drafts(comparison, copied)
    assert (copied / "drafts" / "word-kd-seed1" / "draft-training").exists()
    fitted = fitted_titles(monkeypatch)
    monkeypatch.setattr(Trainer, "_pass", lambda *_: pytest.fail("the epoch was done"))
    train_drafts(comparison, copied)
    assert fitted == ["word-kd-seed1 draft"]
    assert versions(copied) == versions(run)


def test_two_workers_stop_in_time_and_give_the_same_bundles(
    run: Path, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("seed1", "seed2", "none-seed1", "none-seed2"):
        shutil.rmtree(copied / "drafts" / name)
    comparison = read_comparison(run.parent / "losses.toml")
    with pytest.raises(Paused, match="2 of 4 drafts are finished"):
        train_drafts(comparison, copied, workers=2, checkpoints=Checkpoints(deadline=0))
    said = capfd.readouterr().err
    assert len(re.findall(r"paused: none-seed[12] pretrained-draft epoch 1/1, batch 1 of ", said)) == 2
    train_drafts(comparison, copied, workers=2)
    assert versions(copied) == versions(run)
    assert "none-seed2 draft epoch 1: train_loss" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["movielens-drafts.toml", "beauty-drafts.toml"])
def test_shipped_kinds_of_drafts_have_equal_parameters(name: str) -> None:
    """Within a hundredth of the language model's, over the codes that the base recipe names."""
    comparison = read_comparison(RUNS / name)
    codes = (64,) * 3 if comparison.base.name == "movielens-100k" else (256,) * 4
    catalogue = random_catalogue(300, codes, seed=1)
    found = {
        variant.loss: build_model(variant.recipe.draft, catalogue, variant.recipe.prompt, 1).parameters
        for variant in comparison.variants
        if variant.seed == 1 and variant.recipe.draft
    }
    assert set(found) >= {"language-model", "heads"}
    assert all(abs(count / found["language-model"] - 1) < 0.01 for count in found.values())


def test_other_prompts_need_another_teacher(tmp_path: Path) -> None:
    """The base recipe's own answers stay where they are, or the two would make each other ask anew."""
    assert not read_comparison(write(tmp_path, f"prompts = 20\n{COMPARISON}")).same_teacher
    assert read_comparison(write(tmp_path, f"prompts = 60\n{COMPARISON}")).same_teacher
    assert read_comparison(write(tmp_path, aligned="")).same_teacher


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('base = "tiny.toml"', 'base = "none.toml"', r"none\.toml: No such file"),
        ("seeds = [1, 2]", "seeds = []", r"losses\.toml: seeds: List should have at least 1 item"),
        ("seeds = [1, 2]", "seeds = [1, 1]", r"seeds: Value error, a seed occurs twice"),
        ("seeds = [1, 2]", "seed = [1, 2]", r"seed: Extra inputs are not permitted"),
        ("epochs = 1", "epochs = 0", r"losses\.toml: schedule\.epochs: Input should be greater than 0"),
        ("epochs = 1", "epoch = 1", r"losses\.toml: schedule\.epoch: Extra inputs are not permitted"),
        ('name = "none"', 'name = "word-kd"', r"losses: Value error, a name occurs twice"),
        ('name = "none"', 'name = "../x"', r"losses\.0\.name: String should match pattern"),
        ('loss = "none"', "weight = 0.5", r"losses\.0\.alignment: Value error, `loss` is missing"),
        ('loss = "word-kd"', 'loss = "magic"', r"losses\.1\.alignment\.loss: Input should be 'atspeed-s'"),
        ("weight = 0.5", "weight = 2", r"losses\.1\.alignment\.weight: Input should be less than"),
        ("weight = 0.5", "beams = 3", r"losses\.1\.alignment: Value error, beams: belongs to the teacher's data"),
        ("weight = 0.5", "budget = 4", r"losses\.1\.alignment: Value error, budget: 4 nodes cannot hold 5 beams"),
        (
            "weight = 0.5 }",
            "weight = 0.5 }\ndraft = { seed = 4 }",
            r"losses\.1\.draft: Value error, seed: is the same for all",
        ),
        (
            "weight = 0.5 }",
            "weight = 0.5 }\ndraft = { heads = { size = 0 } }",
            r"losses\.1\.draft\.heads\.size: Input should",
        ),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in COMPARISON
    with pytest.raises(RecipeError, match=problem) as caught:
        read_comparison(write(tmp_path, COMPARISON.replace(old, new, 1)))
    assert str(tmp_path) in str(caught.value)


def test_base_without_the_varied_part_is_refused(tmp_path: Path) -> None:
    pretrained = f"pretraining = {{ epochs = 2 }}\n{COMPARISON}"
    with pytest.raises(RecipeError, match=r"losses\.toml: pretraining: the draft of tiny\.toml has none"):
        read_comparison(write(tmp_path, pretrained, aligned=""))
    path = write(tmp_path)
    base = path.with_name("tiny.toml")
    base.write_text(base.read_text().partition("[draft.shape]")[0])
    with pytest.raises(RecipeError, match=r"losses\.toml: base: tiny\.toml has no draft"):
        read_comparison(path)
