"""Bundles with random weights over random catalogues: everything that training would write, in a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Head, Manifest, Precision, Role, hash_files, write_manifest
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.bundles import entry_of
from atspeed.training.export import ExportReport, export_decoder, head_of
from atspeed.training.level_heads import LevelHeadsConfig, LevelHeadsModel
from atspeed.training.level_heads_export import export_level_heads
from atspeed.training.models import SpelledModel
from atspeed.training.sequences import Spelling
from tests.serving import WINDOW

SPECIALS = 3  # pad, bos, end of history
BOS, EOH = 1, 2
_SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.6,  # wide, so that the distributions of a random model are not flat
    "bos_token_id": BOS,
    "eos_token_id": None,
    "pad_token_id": 0,
}


_T5_SHAPE = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def random_t5(vocab_size: int, seed: int, **overrides: object) -> PreTrainedModel:
    """A tiny random T5. Its norms and position biases are random too: ones and small numbers would hide a missing one."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {**_T5_SHAPE, "vocab_size": vocab_size, **overrides}
    model: PreTrainedModel = T5ForConditionalGeneration(T5Config(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "relative" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.train(False)
    return model


def random_model(architecture: str, vocab_size: int, seed: int, **overrides: object) -> PreTrainedModel:
    """A tiny random checkpoint of an architecture."""
    if architecture == "t5":
        return random_t5(vocab_size, seed, **overrides)
    torch.manual_seed(seed)
    shape = {**_SHAPE, "vocab_size": vocab_size, **overrides}
    models = {
        "gemma": (GemmaConfig, GemmaForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "phi3": (Phi3Config, Phi3ForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config, model = models[architecture]
    if architecture == "phi3":  # whose padding token is 32,000
        shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if architecture in {"gemma", "qwen3"}:
        shape["head_dim"] = 16
    built: PreTrainedModel = model(config(**shape))
    built.train(False)
    return built


def random_heads(catalogue: Catalogue, seed: int) -> LevelHeadsModel:
    """A tiny random draft with heads."""
    torch.manual_seed(seed)
    sizes = list(catalogue.trie.codebook_sizes)
    shape: dict[str, Any] = {**_SHAPE, "vocab_size": SPECIALS + sum(sizes), "eos_token_id": None}
    model = LevelHeadsModel(LevelHeadsConfig(**shape, codebook_sizes=sizes, first_code=SPECIALS, head_size=12))
    model.train(False)
    return model


def export_model(
    model: PreTrainedModel, folder: Path, code_tokens: Sequence[int], *, precision: Precision, head: Head
) -> ExportReport:
    """Export a model of any kind."""
    if isinstance(model, LevelHeadsModel):
        return export_level_heads(model, folder, code_tokens=code_tokens)
    return export_decoder(model, folder, code_tokens=code_tokens, precision=precision, head=head)


def shared_tokens(catalogue: Catalogue) -> tuple[int, ...]:
    """Tokens that all levels share: one for each code, and one for the tail."""
    return tuple(
        SPECIALS if code >= tail else SPECIALS + 1 + code
        for size, tail in zip(catalogue.trie.codebook_sizes, catalogue.tail_start.tolist(), strict=True)
        for code in range(size)
    )


@dataclass(frozen=True)
class TestBundle:
    """A bundle on disk and the checkpoints that it was exported from."""

    __test__ = False

    bundle: Bundle
    target: PreTrainedModel
    draft: PreTrainedModel

    @property
    def root(self) -> Path:
        """Its directory."""
        return self.bundle.root


def write_bundle(
    root: Path,
    catalogue: Catalogue,
    *,
    rule: ScoringRule = ScoringRule.VOCAB,
    architecture: str = "llama",
    draft_architecture: str = "",
    seed: int = 0,
    draft_noise: float = 0.02,
    allow_empty_history: bool = False,
    max_items: int = 8,
    drop_block: int = 1,
    target_shape: Mapping[str, object] = MappingProxyType({}),
    precision: Precision = "float32",
    code_tokens: tuple[int, ...] | None = None,
    items_per_path: int | None = None,
    draft_heads: bool = False,
) -> TestBundle:
    """Export a random target and, as its draft, the same weights with noise: so acceptance is neither 0 nor 1.

    target_shape: what of the target's config is not as usual; its draft then stays tiny and knows nothing of it.
    draft_architecture: another one than the target's, for a draft that knows nothing of it.
    code_tokens: those of both models; by default each code column has its own.
    draft_heads: a draft with heads, whose Llama is like the target; the heads know nothing of it.
    """
    vocab = SPECIALS + catalogue.trie.columns
    code_tokens = code_tokens or tuple(range(SPECIALS, vocab))
    target = random_model(architecture, vocab, seed, **target_shape)
    draft = (
        random_heads(catalogue, seed) if draft_heads else random_model(draft_architecture or architecture, vocab, seed)
    )
    if draft_heads:
        draft.load_state_dict(target.state_dict(), strict=False)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn_like(weight) * draft_noise)
    catalogue.save(root / "catalogue")
    models: dict[Role, SpelledModel] = {}
    made: tuple[tuple[Role, PreTrainedModel], ...] = (("target", target), ("draft", draft))
    for role, model in made:
        prefix = () if model.config.is_encoder_decoder else (BOS,)
        prompt = PromptTemplate(prefix=prefix, suffix=(EOH,), max_items=max_items, drop_block=drop_block)
        spelling = Spelling(code_tokens=code_tokens, prompt=prompt, pad_token=0, vocab_size=vocab)
        models[role] = SpelledModel(model, spelling)
    reports = {
        role: export_model(
            spelled.model, root / role, spelled.spelling.code_tokens, precision=precision, head=head_of(rule)
        )
        for role, spelled in models.items()
    }
    files = hash_files(root)
    entries = {role: entry_of(role, models[role], report, files) for role, report in reports.items()}
    manifest = Manifest(
        name="random",
        scoring_rule=rule,
        allow_empty_history=allow_empty_history,
        items_per_path=items_per_path,
        catalogue_version=catalogue.version,
        target=entries["target"],
        draft=entries["draft"],
        files=files,
    )
    write_manifest(root, manifest)
    return TestBundle(Bundle(root), target, draft)


def write_run(root: Path, catalogue: Catalogue, *, seed: int = 0) -> TestBundle:
    """root/bundle with root/target-checkpoint and root/draft-checkpoint beside it, as `atspeed train` leaves them."""
    made = write_bundle(root / "bundle", catalogue, seed=seed)
    for role, model in (("target", made.target), ("draft", made.draft)):
        entry = made.bundle.manifest.models[role]
        spelling = Spelling(
            code_tokens=entry.code_tokens, prompt=entry.prompt, pad_token=0, vocab_size=entry.vocab_size
        )
        (root / f"{role}-checkpoint").mkdir()
        SpelledModel(model, spelling).save(root / f"{role}-checkpoint")
    return made


def random_history(catalogue: Catalogue, length: int, seed: int) -> list[str]:
    """Ids of random items."""
    rng = np.random.default_rng(seed)
    chosen: npt.NDArray[np.int64] = rng.integers(0, catalogue.items, length)
    return [catalogue.id_of(int(item)) for item in chosen]


def new_bundle(root: Path, catalogue: Catalogue) -> Path:
    """The bundle that all these tests serve."""
    return write_bundle(root, catalogue, max_items=WINDOW).root
