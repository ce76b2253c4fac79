"""Loads Hugging Face checkpoints; refuses other weights than those of the config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging

from atspeed.training.errors import ExportError
from atspeed.training.generation import drop_generation_defaults

_REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Arguments of `from_pretrained` that return what does not fit, instead of an error that points to a log."""


def load_checkpoint(path: Path) -> PreTrainedModel:
    """Load a language model, causal or T5, from a local directory, in float32 and eval mode.

    Raises ExportError; never downloads.
    """
    model = load_whole(path, torch.float32)
    drop_generation_defaults(model, str(path))
    return model


def load_whole(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a language model that has the weights of its config, no fewer and no more. dtype: or "auto", as stored.

    Raises ExportError.
    """
    if not (path / "config.json").is_file():
        raise ExportError(f"{path}: no config.json: not a Hugging Face checkpoint")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            family: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            loaded = family.from_pretrained(path, local_files_only=True, dtype=dtype, **_REPORTED)
    except Exception as error:  # transformers raises almost any kind for a file that it cannot use
        raise ExportError(f"{path}: transformers cannot load it: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    # transformers fills missing weights with random numbers, and leaves others out; it only logs a warning.
    if other := sorted(name for name, *_ in loaded[1]["mismatched_keys"]):
        raise ExportError(f"{path}: weights of another shape than in config.json: {', '.join(other[:5])}")
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ExportError(f"{path}: weights missing from the checkpoint: {', '.join(missing[:5])}")
    parts = {name.partition(".")[0] for name in model.state_dict()}  # a value head, say, is no part of the model
    if unknown := sorted(name for name in loaded[1]["unexpected_keys"] if name.partition(".")[0] in parts):
        raise ExportError(f"{path}: config.json has no place for weights of the checkpoint: {', '.join(unknown[:5])}")
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings of transformers: what they say of a checkpoint is checked, and said in one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with the next one if it ends in a colon; its kind if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
