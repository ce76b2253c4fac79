"""Tiny checkpoints with real tokenizers, in the form that authors of generative recommenders publish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tests.bundles import random_model

# What tokenizers are trained on: words of prompts, line ends and punctuation, so that merges cross their boundaries.
TEXT = [
    "Below is an instruction that describes a task, paired with an input that provides further context. \n\n",
    "### Instruction:\nCan you predict the next possible item that the user may expect?\n\n### User Input: \n",
    "The user has interacted with items in chronological order. \n\n### Response:\n system user assistant You are\n",
    "given the following chronological interaction history: , . 1. 2. 3. \n\n\n### Response: <a> <b_> <c_1 2 >",
]
# The words of Qwen's tokenizer.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe_tokenizer(names: Sequence[str]) -> Any:
    """A byte-level BPE like Qwen's, without a BOS, with the code names added as their authors do."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    made: Any = PreTrainedTokenizerFast
    return _with_names(made(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"), names)


def unigram_tokenizer(names: Sequence[str]) -> Any:
    """A SentencePiece-like tokenizer as LLaMA's: `▁` for spaces, a BOS, with the code names added."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=140, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made: Any = PreTrainedTokenizerFast
    return _with_names(made(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"), names)


def normalising_tokenizer(names: Sequence[str], *, normalized: bool = False) -> Any:
    """A BPE with byte fallback that prepends `▁` in its normalizer, as the converted tokenizer of LLaMA 2.

    normalized: whether added names are matched in normalised text, where they begin with `▁` themselves.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_of], show_progress=False
    )
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in TEXT], trainer)  # a line feed is a byte
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made: Any = PreTrainedTokenizerFast
    added = [AddedToken(name, normalized=normalized) for name in names]
    return _with_names(made(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"), added)


TOKENIZERS = {"bpe": bpe_tokenizer, "unigram": unigram_tokenizer, "normalising": normalising_tokenizer}


def _with_names(tokenizer: Any, names: Sequence[str | AddedToken]) -> Any:
    tokenizer.add_tokens(sorted({str(name): name for name in names}.values(), key=str))
    return tokenizer


@dataclass(frozen=True)
class MadeCheckpoint:
    """A checkpoint on disk with an index and histories.

    Attributes:
        folder: of the checkpoint.
        index: the index file.
        histories: JSON lines of users and items.
        paths: the names of each item's codes.
        users: the histories.
        tokenizer: the tokenizer.
        model: the model, as it was saved.
    """

    folder: Path
    index: Path
    histories: Path
    paths: dict[str, list[str]]
    users: list[list[str]]
    tokenizer: Any
    model: PreTrainedModel


def random_paths(items: int, seed: int, *, levels: int = 3, codes: int = 30) -> dict[str, list[str]]:
    """Paths with gaps between the numbers of codes, and some items that share a path."""
    rng = np.random.default_rng(seed)
    numbers = rng.choice(rng.permutation(256)[:codes], size=(items, levels))
    numbers[1] = numbers[0]
    return {
        str(item): [f"<{chr(ord('a') + level)}_{number}>" for level, number in enumerate(row)]
        for item, row in enumerate(numbers.tolist())
    }


def random_users(items: Sequence[str], count: int, seed: int, longest: int = 13) -> list[list[str]]:
    """Histories of 1 to `longest` items, every length among the first ones."""
    rng = np.random.default_rng(seed)
    return [[str(item) for item in rng.choice(list(items), size=1 + user % longest)] for user in range(count)]


def make_checkpoint(
    folder: Path,
    paths: dict[str, list[str]],
    *,
    architecture: str = "qwen2",
    tokenizer: str = "bpe",
    users: int = 40,
    padding: int = 5,
    names: Sequence[str] = (),
    **overrides: Any,
) -> MadeCheckpoint:
    """Write a random checkpoint. padding: rows of the embedding beyond the tokenizer. names: of further tokens."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    made = TOKENIZERS[tokenizer]([*(name for path in paths.values() for name in path), *names])
    settings: dict[str, Any] = {"max_position_embeddings": 512, "initializer_range": 0.3} | overrides
    model = random_model(architecture, len(made) + padding, 1, **settings)
    histories = random_users(list(paths), users, 2)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "checkpoint")
    made.save_pretrained(folder / "checkpoint")
    (folder / "index.json").write_text(json.dumps(paths))
    lines = (json.dumps({"user": str(user), "items": items}) for user, items in enumerate(histories))
    (folder / "histories.jsonl").write_text("\n".join(lines))
    return MadeCheckpoint(
        folder / "checkpoint", folder / "index.json", folder / "histories.jsonl", paths, histories, made, model
    )
