"""A draft for a given target: the target stays as it is, another one is refused, a run that stopped continues."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from atspeed.benchmarks.histories import prompt_tokens
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.errors import BundleError
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.distillation import GivenTarget, distill, split
from atspeed.training.errors import DataError, ExportError, Paused, RecipeError
from atspeed.training.recipe import (
    Alignment,
    DistillRecipe,
    DraftRecipe,
    RunSettings,
    Schedule,
    Shape,
    read_distill_recipe,
)
from atspeed.training.sequences import Sequencer
from atspeed.training.teacher import Teacher
from tests.bundles import TestBundle, random_history, random_model, write_bundle

pytestmark = pytest.mark.usefixtures("one_torch_thread")
RNG = np.random.default_rng(4)
SIZES, TAIL = (
    (6, 5, 5, 1),
    (6, 5, 4, 0),
)  # the third level holds a digit or "\n", the fourth "\n" for items with a digit


def _paths() -> np.ndarray:
    """Two codes; where two items collide, a digit; then a scored end."""
    pairs = [(a, b) for a in range(6) for b in range(5) if (a + b) % 3]
    digits = [(a, b, digit, 0) for a, b in pairs[::4] for digit in range(2)]
    return np.array([*((a, b, 4, -1) for a, b in pairs if (a, b) not in pairs[::4]), *digits])


PATHS = _paths()
CATALOGUE = Catalogue.build([f"item-{n}" for n in range(len(PATHS))], PATHS, SIZES, tail_start=TAIL)
HISTORIES = {f"u{n}": tuple(random_history(CATALOGUE, 2 + n % 6, seed=n)) for n in range(30)}


def a_recipe(**alignment: object) -> DistillRecipe:
    """Two epochs of a tiny draft."""
    wanted = {"loss": "level-kd", "beams": 5, "budget": 10, "weight": 1.0} | alignment
    return DistillRecipe(
        draft=DraftRecipe(
            shape=Shape(hidden_size=8, intermediate_size=16, layers=1, heads=1, kv_heads=1),
            pretraining=Schedule(epochs=1, batch_size=16),
            schedule=Schedule(epochs=2, batch_size=16, learning_rate=1e-2),
            alignment=Alignment.model_validate(wanted),
        )
    )


def given(made: TestBundle, model: PreTrainedModel | None = None) -> GivenTarget:
    return GivenTarget(
        made.bundle, lambda: model or made.target, "CHECKPOINT", "digest of made" if not model else "other"
    )


Distil = Callable[[Path], Path]


def run(made: TestBundle, folder: Path, recipe: DistillRecipe | None = None, **options: Checkpoints) -> Path:
    return distill(
        given(made), HISTORIES, recipe or a_recipe(), folder / "out", folder / "run", source="h", threads=1, **options
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    """A bundle with a tail and paths of unequal lengths."""
    folder = tmp_path_factory.mktemp("bundle")
    return write_bundle(folder / "given", CATALOGUE, rule=ScoringRule.VOCAB, seed=3)


@pytest.fixture(scope="module")
def done(made: TestBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished distillation: run/ and out/."""
    folder = tmp_path_factory.mktemp("done")
    run(made, folder)
    return folder


def test_the_new_bundle_holds_the_same_target_and_the_draft(made: TestBundle, done: Path) -> None:
    before, bundle = made.bundle.manifest, Bundle(done / "out")
    after = bundle.manifest
    bundle.verify()
    assert after.target == before.target
    assert after.model_version("target") == before.model_version("target")
    assert after.catalogue_version == before.catalogue_version
    for name, digest in before.files.items():
        assert name.startswith("draft/") or after.files[name] == digest
    assert after.draft is not None
    assert before.draft is not None
    assert after.draft.fingerprint != before.draft.fingerprint
    assert after.draft.plan_scale is not None
    assert len(after.draft.plan_scale) == 3
    assert after.draft.vocab_size == 3 + sum(SIZES)
    assert after.draft.prompt.max_items == before.target.prompt.max_items
    assert set(after.provenance.metrics) == {"agreement.accepted", "agreement.covered"}
    assert '"level-kd"' in after.provenance.draft


def test_the_draft_learns(done: Path) -> None:
    log = json.loads((done / "run" / "draft-log.json").read_text())
    assert log[-1]["train_loss"] < log[0]["train_loss"]


def test_a_finished_run_is_not_repeated(made: TestBundle, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Teacher, "shard", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(GivenTarget, "check", lambda *_: pytest.fail("compared again"))
    assert run(made, done) == done / "out"


def test_a_bundle_of_the_checkpoint_in_int8_gets_the_same_draft(
    done: Path, made: TestBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run folder of the float32 bundle nothing is trained again."""
    int8 = write_bundle(tmp_path / "int8", CATALOGUE, rule=made.bundle.manifest.scoring_rule, seed=3, precision="int8")
    monkeypatch.setattr(Teacher, "shard", lambda *_: pytest.fail("asked again"))
    run_folder = shutil.copytree(done / "run", tmp_path / "run")
    out = distill(given(int8), HISTORIES, a_recipe(), tmp_path / "out", run_folder, source="h", threads=1)
    one, other = Bundle(done / "out").manifest, Bundle(out).manifest
    assert other.target == int8.bundle.manifest.target
    assert other.target.precision == "int8"
    assert other.draft == one.draft


@pytest.mark.parametrize("rule", list(ScoringRule), ids=str)
def test_the_teacher_reads_the_prompts_that_the_target_is_served(
    rule: ScoringRule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token, with the bundle's suffix and without tails; and its beams follow the bundle's rule."""
    made = write_bundle(tmp_path / "given", CATALOGUE, rule=rule, seed=3)
    seen: list[Teacher] = []
    shard = Teacher.shard

    def noted(teacher: Teacher, *rest: object) -> object:
        seen.append(teacher)
        return shard(teacher, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Teacher, "shard", noted)
    bundle = Bundle(run(made, tmp_path))
    bundle.verify()
    assert bundle.manifest.target == made.bundle.manifest.target
    assert bundle.manifest.scoring_rule is rule
    (teacher,) = seen
    assert teacher.rule is rule
    for history in HISTORIES.values():
        items = CATALOGUE.find(history)
        expected = prompt_tokens(CATALOGUE, made.bundle.model("target"), items.tolist())
        np.testing.assert_array_equal(teacher.sequencer.prompt(items), expected)


class Impatient(Checkpoints):
    """Checkpoints that ask for a stop at every opportunity."""

    @property
    def stopping(self) -> bool:
        return True


def test_a_run_in_the_shortest_steps_gives_the_same_bundle(made: TestBundle, done: Path, tmp_path: Path) -> None:
    stopped: list[str] = []
    while True:
        assert len(stopped) < 60
        try:
            stepped = run(made, tmp_path, checkpoints=Impatient())
        except Paused as paused:
            stopped.append(str(paused))
            assert not (tmp_path / "out").exists()
        else:
            break
    stages = ("target", "teacher", "pretrained-draft", "draft", "plan-scale")
    assert [text for text in stopped if text.endswith("is done")] == [f"{stage} is done" for stage in stages]
    assert Bundle(stepped).manifest.version == Bundle(done / "out").manifest.version


def test_another_loss_keeps_the_teachers_answers(
    made: TestBundle, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "copy"))
    monkeypatch.setattr(Teacher, "shard", lambda *_: pytest.fail("asked again"))
    bundle = Bundle(run(made, folder, a_recipe(loss="seq-kd")))
    assert bundle.manifest.version != Bundle(done / "out").manifest.version


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    return write_bundle(tmp_path_factory.mktemp("plain") / "given", CATALOGUE, seed=3)


def refused(plain: TestBundle, model: PreTrainedModel, folder: Path) -> str:
    """The message; nothing was trained and no bundle was written."""
    with pytest.raises(ExportError) as raised:
        distill(given(plain, model), HISTORIES, a_recipe(), folder / "out", folder / "run", source="h", threads=1)
    assert not (folder / "out").exists()
    assert not (folder / "run" / "teacher").exists()
    return str(raised.value)


def test_a_checkpoint_of_other_weights_is_refused(plain: TestBundle, tmp_path: Path) -> None:
    """A checkpoint as of another epoch: one weight is changed a little."""
    other = random_model("llama", plain.bundle.model("target").vocab_size, seed=3)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0] += 0.05
    message = refused(plain, other, tmp_path)
    assert "CHECKPOINT: not the checkpoint that the target of" in message
    assert "in a logit" in message


def test_a_checkpoint_of_another_shape_is_refused_by_name(plain: TestBundle, tmp_path: Path) -> None:
    vocabulary = plain.bundle.model("target").vocab_size
    deeper = random_model("llama", vocabulary, seed=3, num_hidden_layers=3)
    assert "its layers is 3, the bundle's 2" in refused(plain, deeper, tmp_path)
    other = random_model("qwen2", vocabulary, seed=3)
    assert "its architecture is qwen2, the bundle's llama" in refused(plain, other, tmp_path)


def test_the_checkpoint_of_an_int8_target_is_known_from_another(tmp_path: Path) -> None:
    """The bundle's rounding is no difference; other weights are."""
    made = write_bundle(tmp_path / "given", CATALOGUE, seed=3, precision="int8")
    spelled = Sequencer.of(given(made).spelling, CATALOGUE, False)
    dataset = split(HISTORIES, "h", RunSettings(), held=3)
    assert given(made).check(spelled, dataset, CATALOGUE)["largest logit error"] > 0
    other = random_model("llama", made.bundle.model("target").vocab_size, seed=4)
    with pytest.raises(ExportError, match="not the checkpoint that the target of"):
        given(made, other).check(spelled, dataset, CATALOGUE)


def test_a_damaged_bundle_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "given", CATALOGUE, seed=3)
    with (made.root / "target" / "model.onnx.data").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match="its SHA-256 differs"):
        run(made, tmp_path)
    assert not (tmp_path / "run" / "teacher").exists()


def test_what_a_run_did_not_write_is_never_replaced(plain: TestBundle, tmp_path: Path) -> None:
    at = partial(distill, given(plain), HISTORIES, a_recipe(), source="h", threads=1)
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(RecipeError, match="exists, and is no bundle of the run"):
        at(taken, tmp_path / "run")
    with pytest.raises(RecipeError, match="would replace"):
        at(plain.root, tmp_path / "run")
    with pytest.raises(RecipeError, match="inside the bundle"):
        at(plain.root / "new", tmp_path / "run")
    with pytest.raises(RecipeError, match="inside the bundle"):
        at(tmp_path / "out", plain.root / "run")
    with pytest.raises(RecipeError, match="inside the new bundle"):
        at(tmp_path / "out", tmp_path / "out" / "run")
    plain.bundle.verify()


def test_an_inflated_target_is_refused(plain: TestBundle, tmp_path: Path) -> None:
    bundle = Bundle(plain.root)
    entry = bundle.manifest.target.model_copy(update={"inflated_from": 5})
    bundle.manifest = bundle.manifest.model_copy(update={"target": entry})
    inflated = replace(given(plain), bundle=bundle)
    with pytest.raises(RecipeError, match="its target is inflated"):
        distill(inflated, HISTORIES, a_recipe(), tmp_path / "out", tmp_path / "run", source="h")


def test_a_target_with_an_encoder_gets_a_draft(tmp_path: Path) -> None:
    """The draft is a decoder. Its prompts are its own, and the target's are those of its encoder."""
    made = write_bundle(tmp_path / "given", CATALOGUE, architecture="t5", seed=3)
    bundle = Bundle(run(made, tmp_path))
    assert bundle.manifest.target == made.bundle.manifest.target
    assert bundle.manifest.draft is not None
    assert bundle.manifest.draft.encoder is None
    log = json.loads((tmp_path / "run" / "draft-log.json").read_text())
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    other = random_model("t5", made.target.config.vocab_size, 9)
    assert "not the checkpoint that the target of" in refused(made, other, tmp_path / "other")


def test_histories_without_a_prompt_leave_no_folder(plain: TestBundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to learn from"):
        distill(given(plain), {"u": ("0",)}, a_recipe(), tmp_path / "out", tmp_path / "run", source="h")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", ["level-kd", "coverage"])
def test_paths_of_one_code(loss: str, tmp_path: Path) -> None:
    """Nothing is planned on them: there are no plan scales, and coverage has nothing to compare."""
    catalogue = Catalogue.build([f"item-{n}" for n in range(6)], np.arange(6)[:, None], (6,))
    made = write_bundle(tmp_path / "given", catalogue, seed=3)
    histories = {f"u{n}": tuple(random_history(catalogue, 4, seed=n)) for n in range(8)}
    at = partial(distill, given(made), histories, a_recipe(loss=loss), tmp_path / "out", tmp_path / "run", source="h")
    if loss == "coverage":
        with pytest.raises(RecipeError, match="coverage needs planned levels"):
            at()
    else:
        assert Bundle(at()).model("draft").plan_scale in {None, ()}


def test_the_split_holds_out_last_items_of_a_fifth_of_the_users() -> None:
    histories = {f"u{n}": tuple(f"i{n}-{place}" for place in range(4)) for n in range(20)}
    dataset = split(histories, "h", RunSettings(), held=300)
    assert len(dataset.valid) == 4
    for user, history in histories.items():
        kept = history[:-1] if user in dataset.valid else history
        assert dataset.train[user] == kept
        assert dataset.valid.get(user, history[-1:]) == history[-1:]
    assert len(split(histories, "h", RunSettings(), held=2).valid) == 2


def test_the_split_leaves_out_histories_without_a_prompt_of_their_own() -> None:
    """One that begins another, and one of a single item; the latter is a prompt where the empty history is one."""
    histories = {"a": ("1", "2"), "b": ("1", "2", "3"), "c": ("4",), "d": ("1", "2", "3")}
    assert len(split(histories, "h", RunSettings(), held=0).train) == 1
    assert set(split(histories, "h", RunSettings(allow_empty_history=True), held=0).train.values()) == {
        ("1", "2", "3"),
        ("4",),
    }
    with pytest.raises(DataError, match="h: no user has 2 items or more"):
        split({"c": ("4",)}, "h", RunSettings(), held=0)


def test_a_recipe_holds_the_draft_only(tmp_path: Path) -> None:
    assert read_distill_recipe(None).draft.alignment is not None
    path = tmp_path / "recipe.toml"
    shape = "hidden_size = 8\nintermediate_size = 8\nlayers = 1\nheads = 1\nkv_heads = 1"
    draft = f"[draft.shape]\n{shape}\n[draft.schedule]\nepochs = 1\n"
    path.write_text(draft)
    with pytest.raises(RecipeError, match="alignment: is missing"):
        read_distill_recipe(path)
    path.write_text(f'{draft}[draft.alignment]\nloss = "level-kd"\n[target.schedule]\nepochs = 1\n')
    with pytest.raises(RecipeError, match="target: Extra inputs are not permitted"):
        read_distill_recipe(path)
