"""The whole way from a recipe to a bundle, on made-up data; and what is done again when something changes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.training import bundles
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.errors import Paused, RecipeError
from atspeed.training.export import export_decoder
from atspeed.training.models import SpelledModel, build_model, code_names
from atspeed.training.pipeline import load_dataset, train
from atspeed.training.recipe import Alignment, AtspeedData, ModelRecipe, PretrainedBase, PromptWindow, Recipe, Schedule
from atspeed.training.semantic_ids import build_catalogue
from atspeed.training.sequences import Batch
from atspeed.training.trainer import FitState, Trainer
from tests.recipes import TINY, fitted_titles, with_epochs


def shorter(recipe: Recipe) -> Recipe:
    """The same recipe with two epochs per model, on fewer users."""
    assert recipe.draft is not None
    models = {"target": with_epochs(recipe.target, 2), "draft": with_epochs(recipe.draft, 2)}
    return recipe.model_copy(update=models | {"data": recipe.data.model_copy(update={"users": 50})})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of runs/tiny.toml."""
    folder = tmp_path_factory.mktemp("tiny")
    train(TINY, folder, threads=1)
    return folder


def test_the_bundle_opens_and_verifies(run: Path) -> None:
    bundle = Bundle(run / "bundle")
    bundle.verify()
    bundle.catalogue().trie.check_integrity()
    assert bundle.manifest.provenance.terms == "Made up; no terms."
    assert bundle.manifest.allow_empty_history
    assert bundle.model("draft").parameters <= bundle.model("target").parameters / 10


def test_checkpoints_spell_as_the_bundle_does(run: Path) -> None:
    manifest = Bundle(run / "bundle").manifest
    for role, entry in manifest.models.items():
        spelled = SpelledModel.load(run / f"{role}-checkpoint")
        assert (spelled.spelling.code_tokens, spelled.spelling.prompt) == (entry.code_tokens, entry.prompt)
        assert spelled.parameters == entry.parameters


def test_the_target_learns(run: Path) -> None:
    """Each item has two likely successors among 60: popularity cannot know them, the target does."""
    measured = json.loads((run / "metrics.json").read_text())["test"]
    assert measured["target"]["recall@10"] > measured["popularity"]["recall@10"] + 0.1


def test_finished_training_leaves_no_state(run: Path) -> None:
    assert not list(run.glob("*-training"))
    assert not list(run.rglob("*.partial"))


def test_finished_stages_are_skipped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda _: pytest.fail("trained again"))
    monkeypatch.setattr(bundles, "export_decoder", lambda *_, **__: pytest.fail("exported again"))
    train(TINY, run, threads=1)


def test_a_changed_draft_keeps_the_target(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    trained = fitted_titles(monkeypatch)
    assert TINY.draft is not None
    train(TINY.model_copy(update={"draft": with_epochs(TINY.draft, 1)}), folder, threads=1)
    assert trained == ["draft"]
    before, after = Bundle(run / "bundle").manifest, Bundle(folder / "bundle").manifest
    assert before.target == after.target
    assert before.draft != after.draft
    Bundle(folder / "bundle").verify()


def test_a_run_that_was_killed_gives_the_same_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the draft's second epoch; the bundle's version is the hash of what it serves."""
    recipe = shorter(TINY)
    whole = train(recipe, tmp_path / "whole", threads=1)
    epoch = Trainer._epoch

    def dies(trainer: Trainer[Batch], state: FitState, *rest: Any) -> None:
        if trainer.title == "draft" and state.epoch == 1:
            raise KeyboardInterrupt
        epoch(trainer, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", dies)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "killed", threads=1)
    assert not (tmp_path / "killed" / "bundle").exists()
    resumed = train(recipe, tmp_path / "killed", threads=1)
    assert Bundle(resumed).manifest.version == Bundle(whole).manifest.version


def test_the_state_of_another_recipe_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug waiting to happen: a state on disk under the same name, but of a model with another seed or shape."""
    save = Trainer._save_state

    def dies(trainer: Trainer[Batch], *rest: Any) -> None:
        save(trainer, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_state", dies)
        with pytest.raises(KeyboardInterrupt):
            train(shorter(TINY), tmp_path / "run", threads=1)
    other = shorter(TINY).model_copy(update={"seed": 2})
    mixed = train(other, tmp_path / "run", threads=1)
    assert Bundle(mixed).manifest.version == Bundle(train(other, tmp_path / "clean", threads=1)).manifest.version


class Impatient(Checkpoints):
    """Checkpoints that ask for a stop at every opportunity."""

    @property
    def stopping(self) -> bool:
        return True


def test_a_run_in_the_shortest_steps_gives_the_same_bundle(tmp_path: Path) -> None:
    """A step of the optimizer, a shard of the teacher or a stage at a time; each call gets on, the last one finishes."""
    recipe = shorter(TINY)
    assert recipe.draft is not None
    alignment = Alignment(loss="word-kd", beams=5, budget=10, prompts=100)
    recipe = recipe.model_copy(update={"draft": recipe.draft.model_copy(update={"alignment": alignment})})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"users": 20})})
    whole = train(recipe, tmp_path / "whole", threads=1)
    stopped: list[str] = []
    while True:
        assert len(stopped) < 60
        try:
            stepped = train(recipe, tmp_path / "steps", threads=1, checkpoints=Impatient())
        except Paused as paused:
            stopped.append(str(paused))
        else:
            break
    assert len(set(stopped)) > 10
    assert [text for text in stopped if text.endswith("is done")] == [
        f"{stage} is done" for stage in ("catalogue", "target", "teacher", "draft", "evaluation", "plan-scale")
    ]
    assert Bundle(stepped).manifest.version == Bundle(whole).manifest.version


def test_data_that_a_generated_data_set_would_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.source: synthetic data is generated, and --data would not be read"):
        load_dataset(TINY, tmp_path)


def test_missing_data_folder_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.source: atspeed needs a data folder"):
        load_dataset(TINY.model_copy(update={"data": AtspeedData(source="atspeed")}), None)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Folder of a pretrained model, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "items", ":", ",", "next"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>").save_pretrained(tmp_path / "base")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def catalogue() -> Catalogue:
    return build_catalogue(load_dataset(TINY, None), TINY.codes, data=None, seed=1)[0]


def part_of(base: Path) -> ModelRecipe:
    words = PretrainedBase(folder=base, prefix="items :", separator=",", suffix="next :")
    return ModelRecipe(base=words, schedule=Schedule(epochs=1))


def test_a_pretrained_base_gets_code_tokens_and_a_prompt_in_words(base: Path, catalogue: Catalogue) -> None:
    spelled = build_model(part_of(base), catalogue, PromptWindow(max_items=4), seed=1)
    assert spelled.spelling.prompt.prefix == (2, 3)
    assert (spelled.spelling.prompt.separator, spelled.spelling.prompt.suffix) == ((4,), (5, 3))
    assert spelled.spelling.code_tokens == tuple(range(6, 6 + catalogue.trie.columns))
    assert spelled.spelling.vocab_size == spelled.model.config.vocab_size == 6 + catalogue.trie.columns
    assert AutoTokenizer.from_pretrained(base).encode("items :") == [2, 3]
    assert code_names(1, 2) == ["<b_0>", "<b_1>"]


def test_a_base_trains_into_a_bundle(base: Path, tmp_path: Path) -> None:
    """The recipe trains like runs/beauty-large.toml: half precision, several batches to a step."""
    schedule = Schedule(epochs=1, batch_size=8, gradient_accumulation=2, mixed_precision="bf16")
    target = part_of(base).model_copy(update={"schedule": schedule})
    recipe = shorter(TINY).model_copy(update={"target": target, "draft": None})
    bundle = Bundle(train(recipe, tmp_path / "run", threads=1))
    bundle.verify()
    assert bundle.manifest.draft is None
    assert bundle.manifest.target.prompt.suffix == (5, 3)


def test_a_base_whose_generation_defaults_cannot_be_saved_trains(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers reads a temperature without sampling, and refuses to write it: after the first epoch."""
    (base / "generation_config.json").write_text('{"temperature": 0.6, "repetition_penalty": 1.1}')
    recipe = shorter(TINY).model_copy(update={"target": part_of(base), "draft": None})
    Bundle(train(recipe, tmp_path / "run", threads=1)).verify()
    told = capsys.readouterr().err
    assert "generation defaults of the checkpoint are not used: repetition_penalty=1.1, temperature=0.6" in told
    kept = json.loads((tmp_path / "run" / "target-checkpoint" / "generation_config.json").read_text())
    assert not kept.keys() & {"temperature", "repetition_penalty"}


def test_missing_base_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"base.folder: .*none is not a folder"):
        build_model(part_of(tmp_path / "none"), catalogue, PromptWindow(), seed=1)


def test_a_base_that_is_a_recommender_already_is_not_retrained(base: Path, catalogue: Catalogue) -> None:
    """Its authors added code tokens as ordinary ones, which `add_tokens(..., special_tokens=True)` would count as new."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<a_0>", "<a_1>", "<b_0>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(
        RecipeError, match="already has the code token <a_0>; `atspeed import` serves such a checkpoint"
    ):
        build_model(part_of(base), catalogue, PromptWindow(), seed=1)


def test_window_that_does_not_fit_the_base_is_refused(base: Path, catalogue: Catalogue) -> None:
    with pytest.raises(RecipeError, match=r"prompt\.max_items: 2000 items do not fit"):
        build_model(part_of(base), catalogue, PromptWindow(max_items=2000), seed=1)


def dropping(share: float) -> ModelRecipe:
    assert TINY.target.shape is not None
    shape = TINY.target.shape.model_copy(update={"dropout": share})
    return TINY.target.model_copy(update={"shape": shape})


def test_dropout_acts_in_training_only(catalogue: Catalogue) -> None:
    dropped, plain = (build_model(dropping(share), catalogue, TINY.prompt, seed=1).model for share in (0.5, 0.0))
    tokens = torch.arange(8)[None]
    assert torch.equal(dropped.train(mode=False)(tokens).logits, plain.train(mode=False)(tokens).logits)
    dropped.train()
    assert not torch.equal(dropped(tokens).logits, dropped(tokens).logits)


def test_dropout_is_neither_saved_nor_exported(catalogue: Catalogue, tmp_path: Path) -> None:
    for share in (0.5, 0.0):
        spelled = build_model(dropping(share), catalogue, TINY.prompt, seed=1)
        spelled.save(tmp_path / str(share))
        spelled.model.train(mode=False)
        export_decoder(spelled.model, tmp_path / str(share), code_tokens=spelled.spelling.code_tokens)
    names = sorted(path.name for path in (tmp_path / "0.5").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "0.0").iterdir())
    for name in names:
        assert (tmp_path / "0.5" / name).read_bytes() == (tmp_path / "0.0" / name).read_bytes()
    loaded = SpelledModel.load(tmp_path / "0.5").model.train()
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens).logits, loaded(tokens).logits)
