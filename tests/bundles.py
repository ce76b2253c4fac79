"""Bundles with random weights over random catalogues: everything that training would write, in a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

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
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Bundle, Manifest, Precision, Role, hash_files, write_manifest
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.bundles import entry_of
from atspeed.training.export import export_decoder
from atspeed.training.models import SpelledModel
from atspeed.training.sequences import Spelling

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


def random_model(architecture: str, vocab_size: int, seed: int, **overrides: object) -> PreTrainedModel:
    """A tiny random checkpoint of an architecture."""
    torch.manual_seed(seed)
    shape = {**_SHAPE, "vocab_size": vocab_size, **overrides}
    models = {
        "gemma": (GemmaConfig, GemmaForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config, model = models[architecture]
    if architecture in {"gemma", "qwen3"}:
        shape["head_dim"] = 16
    built: PreTrainedModel = model(config(**shape))
    built.train(False)
    return built


def random_catalogue(items: int, codebook_sizes: tuple[int, ...], seed: int) -> Catalogue:
    """Random code paths, some of them shared, under ids `item-<n>`."""
    rng = np.random.default_rng(seed)
    codes = np.stack([np.minimum(rng.geometric(0.15, items) - 1, size - 1) for size in codebook_sizes], axis=1)
    return Catalogue.build([f"item-{n}" for n in range(items)], codes, codebook_sizes)


def tailed_catalogue(items: int, codebook_sizes: tuple[int, ...], seed: int) -> Catalogue:
    """Random paths of one to L codes, each with a scored tail token behind it: the last code of every level but the first.

    The items of a path are in a random order.
    """
    rng = np.random.default_rng(seed)
    codes = np.full((items, len(codebook_sizes) + 1), -1)
    for level, size in enumerate(codebook_sizes):
        codes[:, level] = np.minimum(rng.geometric(0.3, items) - 1, size - 1)
    ends, tails = rng.integers(1, len(codebook_sizes) + 1, items), np.array([*codebook_sizes, 0])
    for path, end in zip(codes, ends.tolist(), strict=True):
        path[end:] = [tails[end], *[-1] * (len(path) - end - 1)]
    sizes = (codebook_sizes[0], *(size + 1 for size in codebook_sizes[1:]), 1)
    ids, rank = [f"item-{n}" for n in range(items)], rng.permutation(items)
    return Catalogue.build(ids, codes, sizes, tail_start=[*codebook_sizes, 0], rank=rank)


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
    seed: int = 0,
    draft_noise: float = 0.02,
    allow_empty_history: bool = False,
    max_items: int = 8,
    drop_block: int = 1,
    target_shape: Mapping[str, object] = MappingProxyType({}),
    precision: Precision = "float32",
    code_tokens: tuple[int, ...] | None = None,
    items_per_path: int | None = None,
) -> TestBundle:
    """Export a random target and, as its draft, the same weights with noise: so acceptance is neither 0 nor 1.

    target_shape: what of the target's config is not as usual; its draft then stays tiny and knows nothing of it.
    code_tokens: those of both models; by default each code column has its own.
    """
    vocab = SPECIALS + catalogue.trie.columns
    code_tokens = code_tokens or tuple(range(SPECIALS, vocab))
    target = random_model(architecture, vocab, seed, **target_shape)
    draft = random_model(architecture, vocab, seed)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn_like(weight) * draft_noise)
    catalogue.save(root / "catalogue")
    prompt = PromptTemplate(prefix=(BOS,), suffix=(EOH,), max_items=max_items, drop_block=drop_block)
    spelling = Spelling(code_tokens=code_tokens, prompt=prompt, pad_token=0, vocab_size=vocab)
    models: dict[Role, SpelledModel] = {
        "target": SpelledModel(target, spelling),
        "draft": SpelledModel(draft, spelling),
    }
    reports = {
        role: export_decoder(spelled.model, root / role, code_tokens=spelling.code_tokens, precision=precision)
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
