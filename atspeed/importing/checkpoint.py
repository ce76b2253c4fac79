"""Reads checkpoints: sharded, bf16, a delta on a base, or with a LoRA adapter."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from atspeed.importing.errors import ImportingError
from atspeed.importing.index import read_json
from atspeed.training.architectures import check_architecture
from atspeed.training.generation import drop_generation_defaults
from atspeed.training.pretrained import first_line, load_checkpoint, load_whole, quiet_transformers

_ADAPTER = "adapter_config.json"
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
_HASHED = ("*.json", "*.safetensors", "*.bin", "*.model")
_DELTA_NORM = 0.05
"""Largest mean size of the last norm's weights in a delta: trained ones are near 1 (LLaMA, Qwen), differences near 0."""


@dataclass(frozen=True)
class Source:
    """Where the weights come from.

    Attributes:
        checkpoint: the folder of the checkpoint.
        adapter: a LoRA adapter of this checkpoint.
        base: the checkpoint to which this one is added as a delta.
    """

    checkpoint: Path
    adapter: Path | None = None
    base: Path | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return all folders of the model."""
        return tuple(folder for folder in (self.checkpoint, self.base, self.adapter) if folder)

    def config(self) -> Any:
        """Read the config. Raises ImportingError, or ExportError naming its field, when the model cannot be served."""
        if self.adapter and self.base:
            raise ImportingError("--adapter and --base: give one of them")
        for folder in self.folders:
            _check_folder(folder, adapter=folder == self.adapter)
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(self.checkpoint, local_files_only=True)
        except Exception as error:  # transformers raises almost any kind for a field that it cannot use
            raise ImportingError(f"{self.checkpoint}: config.json: {' '.join(str(error).split())}") from error
        check_architecture(config)
        return config

    def tokenizer(self) -> Any:
        """Load the tokenizer: the adapter's if it has one, since its tokens were added in training."""
        own = self.adapter is not None and any(self.adapter.glob("tokenizer*"))
        return load_tokenizer(self.adapter if self.adapter and own else self.checkpoint)

    def rows(self, config: Any, tokenizer: Any) -> int:
        """Return the rows of the embedding. An adapter with own embeddings changes them."""
        if self.adapter is None:
            return int(config.vocab_size)
        saved = _adapter_rows(self.adapter)
        return saved or max(int(config.vocab_size), len(tokenizer))

    def load(self, rows: int) -> PreTrainedModel:
        """Load the model in float32, with adapter or delta applied. rows: of its embedding."""
        if self.adapter:
            return self._merged(self.adapter, rows)
        if self.base:
            return self._added(self.base)
        model = load_checkpoint(self.checkpoint)
        whole: Any = model
        norm = whole.decoder.final_layer_norm if model.config.is_encoder_decoder else whole.model.norm
        offset = 1.0 if model.config.model_type == "gemma" else 0.0  # whose norm weights are stored around 0
        if float((norm.weight.detach() + offset).abs().mean()) < _DELTA_NORM:
            raise ImportingError(
                f"{self.checkpoint}: its norm weights are near 0, as in a delta; give its base with --base"
            )
        return model

    def _merged(self, adapter: Path, rows: int) -> PreTrainedModel:
        try:
            from peft import PeftModel, get_peft_model_state_dict  # only adapters need the package
            from peft.utils import load_peft_weights
        except ImportError:
            raise ImportingError("peft is not installed: pip install 'atspeed-serving[train]'") from None
        model = load_checkpoint(self.checkpoint)
        if rows != model.config.vocab_size:
            model.resize_token_embeddings(rows, mean_resizing=False)
        try:
            with warnings.catch_warnings(action="ignore"):  # peft's; what they say of weights is checked
                peft = PeftModel.from_pretrained(model, str(adapter))
                expected = set(get_peft_model_state_dict(peft, save_embedding_layers=False))
                given = set(load_peft_weights(str(adapter), device="cpu"))
                merged: Any = peft.merge_and_unload()
        except Exception as error:  # peft raises almost any kind, too
            raise ImportingError(
                f"{adapter}: the adapter does not fit {self.checkpoint}: {first_line(error)}"
            ) from error
        # peft leaves a weight that the file lacks as it is, and ignores one that the model has no place for.
        if wrong := sorted((expected - given) | {name for name in given - expected if "lora_" in name}):
            place = "model" if wrong[0] in given else "adapter"
            raise ImportingError(f"{adapter}: does not fit {self.checkpoint}: the {place} has no {wrong[0]}")
        return _ready(merged)

    def _added(self, base: Path) -> PreTrainedModel:
        """Add the base's weights to the delta, in the delta's own number format, as LC-Rec does.

        Weights of another shape are those of the grown vocabulary: the delta holds them whole.
        """
        delta, given = (load_whole(folder, "auto") for folder in (self.checkpoint, base))
        weights = given.state_dict()
        if missing := sorted(set(delta.state_dict()) - set(weights)):
            raise ImportingError(f"{base}: not the base of {self.checkpoint}: it lacks {missing[0]}")
        with torch.no_grad():
            for name, weight in delta.state_dict().items():
                if weight.shape == weights[name].shape:
                    weight += weights[name]
        drop_generation_defaults(delta, str(self.checkpoint))
        return _ready(delta)

    def digest(self) -> str:
        """Return a hash of all files of the model and its tokenizer."""
        digest = hashlib.sha256()
        for folder in self.folders:
            for path in _hashed_files(folder):
                with path.open("rb") as file:
                    digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer as tokenizer.json has it. Raises ImportingError.

    `AutoTokenizer` of transformers 5 builds some tokenizers anew from their vocabulary, and so changes how they split a text.
    """
    if not any(path.is_file() for name in _TOKENIZERS for path in folder.glob(name)):
        raise ImportingError(f"{folder}: no tokenizer, which is one of {', '.join(_TOKENIZERS)}")
    whole = (folder / "tokenizer.json").is_file()
    if not whole and any(folder.glob("*.model")) and find_spec("sentencepiece") is None:
        raise ImportingError(f"{folder}: has no tokenizer.json, and its *.model needs: pip install sentencepiece")
    loader: Any = PreTrainedTokenizerFast if whole else AutoTokenizer
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ImportingError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}") from error


def _check_folder(folder: Path, *, adapter: bool) -> None:
    """Raise ImportingError unless a folder holds an adapter, or a checkpoint with weights."""
    if adapter:
        content = read_json(folder / _ADAPTER)
        kind = content.get("peft_type") if isinstance(content, dict) else None
        if kind != "LORA":
            raise ImportingError(f"{folder / _ADAPTER}: peft_type {kind!r}, only LORA adapters are merged")
        return
    if not (folder / "config.json").is_file() and (folder / _ADAPTER).is_file():
        raise ImportingError(
            f"{folder}: a LoRA adapter without its base; give the base as the checkpoint and this folder with --adapter"
        )
    if not (folder / "config.json").is_file():
        raise ImportingError(f"{folder}: no config.json: not a Hugging Face checkpoint")
    if (folder / _ADAPTER).is_file():  # transformers would apply it, or not, as peft is installed
        raise ImportingError(f"{folder}: holds a checkpoint and {_ADAPTER}; keep them in two folders")
    if not any(path.suffix in {".safetensors", ".bin"} for path in folder.iterdir()):
        raise ImportingError(f"{folder}: no weights (*.safetensors)")


def _hashed_files(folder: Path) -> Iterator[Path]:
    yield from sorted({path for pattern in _HASHED for path in folder.glob(pattern)})


def _ready(model: Any) -> PreTrainedModel:
    ready: PreTrainedModel = model.float().train(mode=False)
    return ready


def _adapter_rows(adapter: Path) -> int | None:
    """Return the rows of an adapter's own embedding, if it saves one."""
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no dictionary
                if name.endswith(("embed_tokens.weight", "lm_head.weight")) and "lora" not in name:
                    return int(weights.get_slice(name).get_shape()[0])
    except (OSError, SafetensorError) as error:
        raise ImportingError(f"{path}: {first_line(error)}") from error
    return None
