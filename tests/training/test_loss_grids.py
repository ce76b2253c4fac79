"""Grids of settings: which drafts they ask for, which setting is chosen, what a kill leaves, and grids that are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.training.compared_drafts import TrainedDrafts, _judged, train_drafts
from atspeed.training.comparison import read_comparison
from atspeed.training.errors import RecipeError
from atspeed.training.models import SpelledModel
from atspeed.training.recipe import DraftRecipe
from atspeed.training.teacher import TeacherShard
from atspeed.training.trainer import Trainer
from tests.recipes import RUNS, fitted_titles, short_recipe
from tests.training.test_draft_comparison import ALIGNED

GRIDS = """
base = "tiny.toml"
seeds = [1, 2]
schedule = { epochs = 1 }

[[losses]]
name = "seq-kd"
alignment = { loss = "seq-kd", weight = 0.5 }

[[losses]]
name = "atspeed-s"
alignment = { loss = "atspeed-s" }
grid = { renormalise = ["none", 0.1], prefixes = ["target", "draft"] }

[[losses]]
name = "level-kd"
alignment = { loss = "level-kd" }
grid = { weight = [0.5, 1] }
"""
TRIED = [
    "atspeed-s-renormalise-none-prefixes-target-seed1",
    "atspeed-s-renormalise-none-prefixes-draft-seed1",
    "atspeed-s-renormalise-0.1-prefixes-target-seed1",
    "atspeed-s-renormalise-0.1-prefixes-draft-seed1",
    "level-kd-weight-0.5-seed1",
    "level-kd-weight-1.0-seed1",
]


def write(folder: Path, grids: str = GRIDS, aligned: str = ALIGNED) -> Path:
    """A comparison with grids, and its base beside it."""
    (folder / "tiny.toml").write_text(short_recipe(aligned, target_epochs=1))
    path = folder / "grids.toml"
    path.write_text(grids)
    return path


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainedDrafts, list[str]]:
    """A run that was killed in its fourth setting and continued: its folder, its result, the models after the kill."""
    folder = tmp_path_factory.mktemp("grids")
    comparison, save = read_comparison(write(folder)), Trainer._save_state

    def dies(trainer: Trainer[Any], *rest: Any) -> None:
        save(trainer, *rest)
        if trainer.title == f"{TRIED[3]} draft":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save_state", dies)
        with pytest.raises(KeyboardInterrupt):
            train_drafts(comparison, folder / "run", threads=1)
    with pytest.MonkeyPatch.context() as patch:
        fitted = fitted_titles(patch)
        trained = train_drafts(comparison, folder / "run", threads=1)
    return folder / "run", trained, fitted


def test_grid_is_every_combination_of_its_values(tmp_path: Path) -> None:
    comparison = read_comparison(write(tmp_path))
    assert [variant.name for variant in comparison.candidates] == TRIED
    assert len(comparison.variants) == 2 * (len(TRIED) + 1)
    found = [variant.recipe.draft.alignment for variant in comparison.candidates if variant.recipe.draft]
    assert [(each.renormalise, each.prefixes) for each in found[:4] if each] == [
        (None, "target"),
        (None, "draft"),
        (0.1, "target"),
        (0.1, "draft"),
    ]
    assert [each.weight for each in found[4:] if each] == [0.5, 1.0]


def test_setting_is_chosen_by_validation_and_trained_with_all_seeds(
    killed: tuple[Path, TrainedDrafts, list[str]],
) -> None:
    run, trained, _ = killed
    score = {}
    for name in TRIED:
        log = json.loads((run / "drafts" / name / "draft-log.json").read_text())
        score[name] = max((epoch["accepted"], epoch["covered"]) for epoch in log)
    best = {
        loss: max((n for n in TRIED if n.startswith(loss)), key=score.__getitem__) for loss in ("atspeed-s", "level-kd")
    }
    places = {
        "seq-kd/seed1": "seq-kd-seed1",
        "seq-kd/seed2": "seq-kd-seed2",
        **{f"{loss}/seed1": name for loss, name in best.items()},
        **{f"{loss}/seed2": f"{name.removesuffix('1')}2" for loss, name in best.items()},
    }
    assert {name: path.parent.name for name, path in trained.bundles.items()} == places
    for path in trained.bundles.values():
        Bundle(path).verify()
    assert [(each.accepted, each.covered) for each in trained.candidates] == [score[name] for name in TRIED]
    assert [name for name, each in zip(TRIED, trained.candidates, strict=True) if each.chosen] == [*best.values()]
    # Other settings have no bundle, and no draft of another seed.
    made = {path.name for path in (run / "drafts").iterdir()}
    assert made == {*TRIED, *places.values(), "seed1", "seed2", "target"}
    assert {path.parent.name for path in (run / "drafts").glob("*/bundle")} == {*places.values(), "target"}


def test_killed_grid_is_resumed_where_it_was(killed: tuple[Path, TrainedDrafts, list[str]]) -> None:
    _, trained, fitted = killed
    later = [path.parent.name for name, path in trained.bundles.items() if name.endswith("seed2")]
    assert [title for title in fitted if not title.endswith("pretrained-draft")] == [
        f"{name} draft" for name in (*TRIED[3:], "seq-kd-seed1", *later)
    ]


def test_the_drafts_own_beams_are_those_of_the_pretrained_draft(
    killed: tuple[Path, TrainedDrafts, list[str]], tmp_path: Path
) -> None:
    run = killed[0]
    own, targets = (
        TeacherShard.load(folder / "000000000.safetensors")
        for folder in (run / "drafts/seed1/draft-beams", run / "teacher")
    )
    np.testing.assert_array_equal(own.gold, targets.gold)  # the same prompts
    assert own.beams.shape == targets.beams.shape
    assert (own.beams != targets.beams).any()
    drafts = {name: SpelledModel.load(run / "drafts" / name / "draft-checkpoint") for name in TRIED[:2]}
    assert any(
        (first != second).any()
        for first, second in zip(*(each.model.state_dict().values() for each in drafts.values()), strict=True)
    )


def test_nothing_is_chosen_without_validation(tmp_path: Path) -> None:
    variant = read_comparison(write(tmp_path)).candidates[0]
    with pytest.raises(RecipeError, match="grid: no setting can be chosen without validation users"):
        list(_judged([(variant, {})]))


@pytest.mark.parametrize("name", ["beauty", "movielens"])
def test_shipped_grids_train_all_drafts_alike(name: str) -> None:
    comparison = read_comparison(RUNS / f"{name}-losses.toml")
    settings = {variant.name for variant in comparison.variants if variant.seed == 1}
    assert (len(settings), len(comparison.candidates), len(comparison.variants)) == (41, 40, 123)
    schedules = set()
    for variant in comparison.variants:
        draft = variant.recipe.draft
        assert draft
        assert draft.alignment
        assert draft.alignment.prompts == 12_000
        schedules.add(draft.schedule.model_dump_json())
    assert len(schedules) == 1


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("weight = [0.5, 1]", "weight = []", r"losses\.2\.grid\.weight: List should have at least 1 item"),
        ("weight = [0.5, 1]", "weight = [1, 1.0]", r"losses\.2\.grid: Value error, weight: a value occurs twice"),
        ("weight = [0.5, 1]", "weight = [0.5, 2]", r"losses\.2\.grid\.weight: Input should be less than or equal to 1"),
        ("weight = [0.5, 1]", "wight = [0.5, 1]", r"losses\.2: Value error, grid\.wight: does not change level-kd"),
        ("weight = [0.5, 1]", "renormalise = [0.1]", r"grid\.renormalise: does not change level-kd; it reads"),
        ("weight = [0.5, 1]", "budget = [20, 40]", r"grid\.budget: does not change level-kd"),
        ("weight = [0.5, 1]", "loss = ['none']", r"losses\.2: Value error, grid\.loss: is set in `alignment` too"),
        ('["target", "draft"]', '["gold"]', r"losses\.1\.grid\.prefixes: Input should be 'target' or 'draft'"),
        (
            '"seq-kd", weight',
            '"seq-kd", prefixes = "draft", weight',
            r"losses\.0\.alignment: Value error, prefixes: the dra.*not seq-kd",
        ),
        (
            'name = "seq-kd"',
            'name = "level-kd-weight-0.5"',
            r"losses: two drafts would have the folder level-kd-weight-0\.5-seed1",
        ),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in GRIDS
    with pytest.raises(RecipeError, match=problem) as caught:
        read_comparison(write(tmp_path, GRIDS.replace(old, new, 1)))
    assert str(tmp_path) in str(caught.value)


def test_own_beams_need_a_pretrained_draft(tmp_path: Path) -> None:
    aligned = ALIGNED[ALIGNED.index("[draft.alignment]") :]
    with pytest.raises(RecipeError, match=r"alignment\.prefixes: the draft's own beams need a `pretraining`"):
        read_comparison(write(tmp_path, aligned=aligned))


def test_recipes_without_prefixes_keep_their_keys() -> None:
    """The default is not written, so that drafts of older runs are not trained again."""
    draft = DraftRecipe.model_validate(
        {"shape": None, "base": {"folder": "x"}, "schedule": {"epochs": 1}, "alignment": {}}
    )
    assert "prefixes" not in draft.model_dump(mode="json")["alignment"]
