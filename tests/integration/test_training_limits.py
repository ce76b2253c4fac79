"""`atspeed train` on data and recipes at their limits: a bundle that verifies, or one line before anything is trained."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from atspeed.cli.main import app
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.training.data_check import check_run_folder
from atspeed.training.errors import RecipeError
from tests.bundles import random_history
from tests.catalogues import random_catalogue
from tests.recipes import short_recipe

ITEMS, USERS = 12, 10
ALIGNED = '[draft.alignment]\nloss = "{loss}"\nbeams = 50\nbudget = 100\nprompts = 40\n'
QUANTISED = '[codes]\nkind = "quantised"\nlevels = 2\n'
NEEDS_HISTORY = ("allow_empty_history = true", "allow_empty_history = false")


@dataclass
class Training:
    """A data folder and a recipe over it, as they should be until a test changes them."""

    folder: Path

    def __post_init__(self) -> None:
        text = re.sub(r"\[data\][^\[]*", '[data]\nsource = "atspeed"\n', short_recipe())
        (self.folder / "recipe.toml").write_text(text)
        self.write_items(levels=2)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def write_items(self, *, items: int = ITEMS, levels: int = 2) -> None:
        catalogue = random_catalogue(max(items, 1), (4,) * levels, seed=1)
        lines = [
            {"id": catalogue.id_of(index), "title": f"number {index}", "codes": catalogue.codes[index].tolist()}
            for index in range(items)
        ]
        (self.folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for number, (split, length) in enumerate((("train", 5), ("valid", 1), ("test", 2))):
            histories = [random_history(catalogue, length, seed=100 * number + user) for user in range(USERS)]
            self.write(split, *(f"u{user} {' '.join(history)}" for user, history in enumerate(histories)))

    def write(self, split: str, *lines: str) -> None:
        (self.folder / f"{split}.txt").write_text("".join(line + "\n" for line in lines))

    def change(self, old: str, new: str) -> None:
        path = self.folder / "recipe.toml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def add(self, section: str) -> None:
        with (self.folder / "recipe.toml").open("a") as recipe:
            recipe.write(section)

    def quantise(self, more: str) -> None:
        path = self.folder / "recipe.toml"
        path.write_text(re.sub(r"\[codes\][^\[]*", f"{QUANTISED}{more}\n", path.read_text()))

    def train(self) -> Result:
        command = ["train", str(self.folder / "recipe.toml"), "--run-folder", str(self.run), "--threads", "1"]
        return CliRunner().invoke(app, [*command, "--data", str(self.folder)])

    def succeeds(self) -> Result:
        """Training ends, and services can serve the bundle that it names."""
        result = self.train()
        assert result.exit_code == 0, result.stderr[-2000:] + repr(result.exception)
        assert result.stdout.rstrip().endswith("bundle")
        verified = CliRunner().invoke(app, ["bundle", "verify", str(self.run / "bundle")])
        assert verified.exit_code == 0, verified.stderr
        return result

    def refused(self) -> str:
        """Ends with one line, and no model was begun; the line."""
        result = self.train()
        assert result.exit_code == 1, repr(result.exception)
        assert not [path for path in self.run.glob("*") if path.name.endswith(("training", "checkpoint"))]
        (line,) = [line for line in result.stderr.splitlines() if line.strip()]
        return line


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A finished run with an aligned draft, which tests copy."""
    training = Training(tmp_path_factory.mktemp("finished"))
    training.add(ALIGNED.format(loss="level-kd"))
    training.succeeds()
    return training


@pytest.fixture
def copied(finished: Training, tmp_path: Path) -> Training:
    """A copy of the run, in which training repeats no stage."""
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    copy = object.__new__(Training)
    copy.folder = tmp_path
    return copy


# Every loss and every empty split; the other pairs are `long`.
@pytest.mark.parametrize(
    ("empty", "loss"),
    [
        (("test",), ""),
        (("valid",), "level-kd"),
        (("valid", "test"), "coverage"),
        pytest.param(("valid", "test"), "", marks=pytest.mark.long),
        pytest.param(("test",), "level-kd", marks=pytest.mark.long),
        pytest.param(("test",), "coverage", marks=pytest.mark.long),
        pytest.param(("valid",), "", marks=pytest.mark.long),
        pytest.param(("valid",), "coverage", marks=pytest.mark.long),
        pytest.param(("valid", "test"), "level-kd", marks=pytest.mark.long),
    ],
)
def test_train_without_a_split_makes_a_bundle_and_names_the_skipped_steps(
    training: Training, empty: tuple[str, ...], loss: str
) -> None:
    """An empty test split left a bundle that no service took, and every later `train` skipped it."""
    for split in empty:
        training.write(split)
    if loss:
        training.add(ALIGNED.format(loss=loss))
    training.change("batch_size = 16", "batch_size = 16\npatience = 1")
    said = training.succeeds().stderr
    assert [f"{split}: no user with items to ask about" in said for split in ("valid", "test")] == [
        split in empty for split in ("valid", "test")
    ]
    metrics = read_manifest(training.run / "bundle").provenance.metrics
    assert bool(metrics) == ("test" not in empty)
    if "valid" in empty:
        assert len(json.loads((training.run / "target-log.json").read_text())) == 2  # all epochs, whatever the patience
    before = (training.run / "bundle" / "manifest.json").stat().st_mtime_ns
    training.succeeds()
    assert (training.run / "bundle" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("lines", [("{split}-stranger item-1",), ("u1", "u2"), ()])
def test_train_without_eval_examples_equals_an_empty_split(training: Training, lines: tuple[str, ...]) -> None:
    """Users without a history, where a prompt needs one, and users without items after it."""
    training.change(*NEEDS_HISTORY)
    for split in ("valid", "test"):
        training.write(split, *(line.format(split=split) for line in lines))
    said = training.succeeds().stderr
    assert "no epoch is chosen" in said
    assert "nothing is measured" in said


def test_stage_with_a_measure_that_is_not_finite_runs_again(copied: Training) -> None:
    """Older runs left this on disk: a NaN in the stage, null in the manifest, and a stage marked as done."""
    for path in (copied.run / "stages" / "evaluation.json", copied.run / "bundle" / "manifest.json"):
        number = "NaN" if path.name == "evaluation.json" else "null"
        text, count = re.subn(r'("agreement\.accepted": ?)[\d.]+', rf"\g<1>{number}", path.read_text())
        assert count == 1
        path.write_text(text)
    copied.succeeds()
    assert "agreement.accepted" in read_manifest(copied.run / "bundle").provenance.metrics


@pytest.mark.parametrize(
    "damaged",
    [
        "catalogue/codes.npy",
        "target-checkpoint/model.safetensors",
        "draft-checkpoint/spelling.json",
        "teacher/000000000.safetensors",
        "stages/plan-scale.json",
        "stages/target.json",
        "bundle/target/model.onnx.data",
        "bundle/manifest.json",
    ],
)
def test_stage_with_unreadable_outputs_runs_again(copied: Training, damaged: str) -> None:
    version = read_manifest(copied.run / "bundle").version
    path = copied.run / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    copied.succeeds()
    assert verify_bundle(copied.run / "bundle").manifest.version == version


def test_a_copied_run_is_finished(copied: Training) -> None:
    """The tests above damage copies. They prove nothing unless an undamaged copy is finished."""
    written = {path: path.stat().st_mtime_ns for path in copied.run.rglob("*.safetensors")}
    assert written
    copied.succeeds()
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ((), r"train: no user has 2 items or more"),
        (("u1", "u2"), r"train: no user has 2 items or more"),
        (("u1 item-1", "u2 item-2"), r"train: no user has 2 items or more"),
    ],
)
def test_train_without_a_history_to_learn_from_is_refused(
    training: Training, train: tuple[str, ...], said: str
) -> None:
    training.change(*NEEDS_HISTORY)
    training.write("train", *train)
    assert re.search(said, training.refused())


def test_train_without_items_is_refused(training: Training) -> None:
    for file in ("items.jsonl", "train.txt", "valid.txt", "test.txt"):
        (training.folder / file).write_text("")
    assert "items: there are none" in training.refused()


@pytest.mark.parametrize(
    ("more", "train", "said"),
    [
        ("codebook_bits = 4", None, r"codes\.codebook_bits: 16 codes per level for only 12 items"),
        (
            "codebook_bits = 2",
            ("u1 item-1",),
            r"codes\.text_weight: 0\.5 needs a train history with two different items",
        ),
        (
            "codebook_bits = 2\ntext_weight = 0",
            ("u1 item-1 item-1",),
            r"codes\.text_weight: 0\.0 needs a train history",
        ),
    ],
)
def test_codes_that_the_data_cannot_give_are_refused(
    training: Training, more: str, train: tuple[str, ...] | None, said: str
) -> None:
    training.quantise(more)
    if train is not None:
        training.write("train", *train)
    assert re.search(said, training.refused())


def test_quantised_codes_of_fewer_items_than_dimensions(training: Training) -> None:
    """faiss refused more dimensions than points: a text has 384."""
    training.quantise("codebook_bits = 2")
    training.succeeds()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("epochs = 2", "epochs = 0", r"schedule\.epochs"),
        ("epochs = 2", "epochs = 2\nitem_dropout = 1.0", r"schedule\.item_dropout"),
        ("learning_rate = 5e-3", "learning_rate = inf", r"target\.schedule\.learning_rate: .*finite"),
        ("learning_rate = 5e-3", "learning_rate = nan", r"target\.schedule\.learning_rate"),
        ("learning_rate = 5e-3", "learning_rate = 5e-3\ngradient_clip = inf", r"gradient_clip: .*finite"),
    ],
)
def test_a_recipe_value_that_trains_nothing_is_refused_by_its_key(
    training: Training, old: str, new: str, said: str
) -> None:
    training.change(old, new)
    assert re.search(said, training.refused())


def test_a_catalogue_of_one_level_trains(training: Training) -> None:
    training.write_items(levels=1)
    training.add(ALIGNED.format(loss="level-kd"))
    training.succeeds()


def test_coverage_over_one_level_is_refused(training: Training) -> None:
    """It is of planned levels: the last is not."""
    training.write_items(levels=1)
    training.add(ALIGNED.format(loss="coverage"))
    assert "draft.alignment.loss: coverage" in training.refused()


@pytest.mark.parametrize(
    "more", ["batch_size = 1000000", "batch_size = 16\nvalidation_users = 1", "batch_size = 16\nwarmup = 1.0"]
)
def test_a_recipe_larger_or_smaller_than_the_data_trains(training: Training, more: str) -> None:
    training.write_items(items=1)
    training.change("evaluation_users = 20", "evaluation_users = 1")
    training.change("batch_size = 16", more)
    training.succeeds()


@pytest.mark.parametrize("rate", ["1e30", "1e300"])
def test_weights_that_are_not_finite_end_the_training_in_one_line(training: Training, rate: str) -> None:
    training.change("learning_rate = 5e-3", f"learning_rate = {rate}")
    result = training.train()
    assert result.exit_code == 1, repr(result.exception)
    assert re.search(
        rf"atspeed: target epoch \d/2: .*schedule\.learning_rate, {re.escape(str(float(rate)))}", result.stderr
    )
    assert not (training.run / "bundle").exists()


def test_epoch_emptied_by_dropout_ends_the_training_in_one_line(training: Training) -> None:
    training.write("train", "u1 item-1 item-2")
    training.change("epochs = 2", "epochs = 2\nitem_dropout = 0.999")
    result = training.train()
    assert result.exit_code == 1, repr(result.exception)
    assert "target epoch 1/2: schedule.item_dropout, 0.999, left no sequence" in result.stderr


@pytest.mark.parametrize("inside", [".", "run", "target/run"])
def test_train_into_a_bundle_is_refused_before_anything_is_written(tmp_path: Path, inside: str) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "target").mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(RecipeError, match="inside the bundle"):
        check_run_folder(bundle / inside)
    assert sorted(path.name for path in bundle.rglob("*")) == ["manifest.json", "target"]
