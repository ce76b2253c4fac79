"""Builds and trains the models of a run, from scratch or from a pretrained base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.data import Dataset
from atspeed.training.errors import RecipeError
from atspeed.training.evaluate import ModelRecommender, Validation
from atspeed.training.generation import drop_generation_defaults
from atspeed.training.level_heads import LevelHeadsConfig, LevelHeadsModel
from atspeed.training.pretrained import load_checkpoint
from atspeed.training.recipe import DraftRecipe, Heads, ModelRecipe, PretrainedBase, PromptWindow, RunSettings, Shape
from atspeed.training.sequences import Sequencer, Spelling, WindowBatches, index_histories
from atspeed.training.trainer import FitState, Loss, Trainer, Validate, batches_per_step, cross_entropy

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = 3  # the code tokens of a model from scratch begin here, in the order of their columns


@dataclass(frozen=True)
class SpelledModel:
    """A model with the tokens of its prompts and codes.

    Attributes:
        model: the Hugging Face model.
        spelling: the tokens of its prompts and codes.
    """

    model: PreTrainedModel
    spelling: Spelling

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def recommender(self, settings: RunSettings, catalogue: Catalogue) -> ModelRecommender:
        """Build the model's recommender under the settings of a run."""
        sequencer = Sequencer.of(self.spelling, catalogue, settings.allow_empty_history)
        return ModelRecommender(self.model, sequencer, catalogue, settings.scoring_rule)

    def to(self, device: torch.device) -> SpelledModel:
        """Move the model to a device."""
        self.model.to(device)  # type: ignore[arg-type] # transformers wraps the method and loses its self
        return self

    def save(self, checkpoint: Path) -> None:
        """Write a Hugging Face checkpoint with the spelling beside it."""
        self.model.save_pretrained(checkpoint)
        self.spelling.save(checkpoint)

    @classmethod
    def load(cls, checkpoint: Path) -> SpelledModel:
        """Read a checkpoint that `save` wrote."""
        return cls(load_checkpoint(checkpoint), Spelling.load(checkpoint))


def build_model(part: ModelRecipe, catalogue: Catalogue, window: PromptWindow, seed: int) -> SpelledModel:
    """Build the untrained model of a recipe's part, reproducible by its seed."""
    torch.manual_seed(seed)
    if part.shape is not None:
        heads = part.heads if isinstance(part, DraftRecipe) else None
        return _from_scratch(part.shape, catalogue, window, heads)
    assert part.base is not None  # noqa: S101 - the recipe holds exactly one of the two
    return _from_base(part.base, catalogue, window)


def _from_scratch(shape: Shape, catalogue: Catalogue, window: PromptWindow, heads: Heads | None = None) -> SpelledModel:
    """Build a Llama whose vocabulary is pad, bos, eos and the code columns. Its prompt is a BOS and the items' codes."""
    columns = catalogue.trie.columns
    prompt = PromptTemplate(prefix=(BOS,), max_items=window.max_items, drop_block=window.drop_block)
    spelling = Spelling(
        code_tokens=tuple(range(SPECIAL_TOKENS, SPECIAL_TOKENS + columns)),
        prompt=prompt,
        pad_token=PAD,
        vocab_size=SPECIAL_TOKENS + columns,
    )
    values: dict[str, Any] = {
        "vocab_size": spelling.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": _longest_sequence(prompt, catalogue),
        "tie_word_embeddings": shape.tie_embeddings,
        "attention_dropout": shape.attention_dropout,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    model = LlamaForCausalLM(LlamaConfig(**values)) if heads is None else _with_heads(values, heads, catalogue)
    if shape.dropout:
        _drop_out(model, shape.dropout)
    return SpelledModel(model, spelling)


def _with_heads(values: dict[str, Any], heads: Heads, catalogue: Catalogue) -> LevelHeadsModel:
    """Build a Llama of these config values with a head per level."""
    sizes = list(catalogue.trie.codebook_sizes)
    if len(sizes) < 2:
        raise RecipeError("draft.heads: codes of one level leave no level for a head")
    config = LevelHeadsConfig(**values, codebook_sizes=sizes, first_code=SPECIAL_TOKENS, head_size=heads.size)
    return LevelHeadsModel(config)


def _drop_out(model: LlamaForCausalLM, share: float) -> None:
    """Add dropout to the embeddings and to the outputs of each block, which Hugging Face's Llama lacks.

    The hooks belong to this object and act in training mode only: checkpoints and exports are the same without them.
    """

    def drop(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, share, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def _from_base(base: PretrainedBase, catalogue: Catalogue, window: PromptWindow) -> SpelledModel:
    """Load a pretrained model with one new token per code column, and a prompt in words around the history."""
    if not base.folder.is_dir():
        raise RecipeError(f"base.folder: {base.folder} is not a folder")
    tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(base.folder, local_files_only=True, dtype=torch.float32)
    drop_generation_defaults(model, f"base.folder: {base.folder}")
    names = [name for level, size in enumerate(catalogue.trie.codebook_sizes) for name in code_names(level, size)]
    known = next(filter(tokenizer.get_vocab().__contains__, names), None)
    # `add_tokens` would also count tokens that exist and only make them special.
    if known:
        raise RecipeError(
            f"base.folder: {base.folder} already has the code token {known}; `atspeed import` serves such a checkpoint as it is"
        )
    tokenizer.add_tokens(names, special_tokens=True)
    # Some bases have more rows than their tokenizer has tokens; these rows are kept.
    model.resize_token_embeddings(max(len(tokenizer), _vocab_size(model)))

    def words(text: str, *, special: bool = False) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=special))

    prompt = PromptTemplate(
        prefix=words(base.prefix, special=True),
        separator=words(base.separator),
        suffix=words(base.suffix),
        max_items=window.max_items,
        drop_block=window.drop_block,
    )
    if not prompt.prefix:
        raise RecipeError("base.prefix: gives the prompt no token, and an empty history would have none")
    if _longest_sequence(prompt, catalogue) > model.config.max_position_embeddings:
        raise RecipeError(f"prompt.max_items: {window.max_items} items do not fit the positions of {base.folder}")
    vocabulary = tokenizer.get_vocab()
    spelling = Spelling(
        code_tokens=tuple(map(vocabulary.__getitem__, names)),
        prompt=prompt,
        pad_token=next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None),
        vocab_size=_vocab_size(model),
    )
    return SpelledModel(model, spelling)


def _vocab_size(model: PreTrainedModel) -> int:
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)  # noqa: S101 - for the type checker
    return embeddings.shape[0]


def code_names(level: int, size: int) -> list[str]:
    """Return the tokens of a level's codes as LC-Rec writes them: <a_0>, <a_1>, ... for level 0."""
    return [f"<{chr(ord('a') + level)}_{code}>" for code in range(size)]


def _longest_sequence(prompt: PromptTemplate, catalogue: Catalogue) -> int:
    """Return the number of tokens of the longest prompt with its codes."""
    return prompt.max_tokens(catalogue.longest_spelling) + catalogue.trie.levels


def train_model(
    part: ModelRecipe,
    settings: RunSettings,
    dataset: Dataset,
    catalogue: Catalogue,
    folder: Path,
    *,
    title: str,
    checkpoints: Checkpoints,
    loss: Loss[Any] = cross_entropy,
    batches: Callable[[Sequencer], Callable[[int], Sequence[Any]]] | None = None,
    validate: Callable[[Validation], Validate] = lambda validation: validation,
    start: SpelledModel | None = None,
    seed: int | None = None,
    build: Callable[[], SpelledModel] | None = None,
) -> tuple[SpelledModel, FitState]:
    """Train a model on the train histories. A run in `folder` is resumed.

    Args:
        part: the model's part of the recipe.
        settings: the settings of the run.
        dataset: the data set.
        catalogue: the catalogue.
        folder: the folder of the training's state.
        title: the name in progress lines.
        checkpoints: when to save and stop.
        loss: the loss on logits and batch. It belongs to `batches`.
        batches: builds each epoch's batches from the model's sequencer; by default windows of the histories.
        validate: wraps the validation that chooses the best epoch.
        start: the same model with other weights to begin from.
        seed: the seed; the run's by default.
        build: builds the untrained model; by default that of the part.

    Raises Paused when the checkpoints say so.
    """
    seed = settings.seed if seed is None else seed
    spelled = build() if build else build_model(part, catalogue, settings.prompt, seed)
    if start is not None:
        spelled.model.load_state_dict(start.model.state_dict())
    sequencer = Sequencer.of(spelled.spelling, catalogue, settings.allow_empty_history)
    windows = WindowBatches(
        sequencer,
        index_histories(catalogue, dataset.train),
        part.schedule.batch_size,
        part.schedule.item_dropout,
        seed,
        run=batches_per_step(part.schedule),
    )
    validation = Validation.of(dataset, catalogue, sequencer, settings, part.schedule)
    trainer: Trainer[Any] = Trainer(
        model=spelled.model,
        batches=batches(sequencer) if batches else windows,
        loss=loss,
        validate=validate(validation),
        schedule=part.schedule,
        folder=folder,
        seed=seed,
        title=title,
        checkpoints=checkpoints,
    )
    state = trainer.fit()
    return SpelledModel(spelled.model.train(mode=False), spelled.spelling), state
