"""Checks of exported graphs: finite passes, and parity with the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.item_texts import ItemTexts
from atspeed.engine.bundle.manifest import Head, Precision, Role
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.errors import BundleError
from atspeed.engine.model.bundle_check import check_finite
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.encoder_decoder import EncoderDecoder
from atspeed.training.architectures import check_supported, decoder_start
from atspeed.training.decoder_graph import DecoderShape
from atspeed.training.device_parity import compare_device
from atspeed.training.errors import ExportError
from atspeed.training.int8_graph import rounded
from atspeed.training.parity import compare

# Largest error of a logit in the parity check, relative to the largest logit (or to 1, if that is larger). Rounding stays
# several times below these; a wrong mask, position, head order or weight is far above them. An int8 file is compared with its
# checkpoint computing from the same codes. The two usually agree to 1e-6. If float32 rounding moves an activation to another
# step in only one of them, errors reached 0.03 in random models with logits of 10 and more.
TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2, "int8": 1e-1}


def _open(model: PreTrainedModel, path: Path, options: RuntimeOptions) -> Decoder:
    return EncoderDecoder(path, options) if model.config.is_encoder_decoder else Decoder(path, options)


def check_tokens(
    model: PreTrainedModel,
    path: Path,
    code_tokens: Sequence[int],
    prompt: PromptTemplate | None,
    texts: ItemTexts | None,
) -> None:
    """Raise ExportError when a pass over a token is not finite: the parity check asks a few random ones only."""
    try:
        decoder = _open(model, path, RuntimeOptions(intra_op_threads=torch.get_num_threads()))
        check_finite(decoder, code_tokens, prompt, texts, decoder_start=decoder_start(model))
    except BundleError as error:
        raise ExportError(str(error)) from error


def check_device_graph(
    model: PreTrainedModel, path: Path, code_tokens: Sequence[int], precision: Precision, head: Head
) -> None:
    """Raise ExportError when a device graph computes something else than its checkpoint. Not in bfloat16, see the module."""
    if precision == "bfloat16":
        return
    try:
        worst, largest = compare_device(model, path, code_tokens, precision, head)
    except BundleError as error:
        raise ExportError(str(error)) from error
    _check_error(path, worst, largest, precision)


def check_origin(
    model: PreTrainedModel, name: str, bundle: Bundle, role: Role, prompts: Sequence[npt.NDArray[np.int64]] = ()
) -> float:
    """Return the largest error of a bundle's model against the checkpoint that it was exported from.

    name: the checkpoint's name in messages. prompts: token ids that are tried beside random token trees.
    Raises ExportError when the checkpoint is another one.
    """
    check_supported(model)
    entry, shape = bundle.model(role), DecoderShape.of(model)
    other = f"{name}: not the checkpoint that the {role} of {bundle.root} was exported from"
    found = {
        "architecture": model.config.model_type,
        "vocab_size": shape.vocab_size,
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    for field, value in found.items():
        if value != getattr(entry, field):
            raise ExportError(f"{other}: its {field} is {value}, the bundle's {getattr(entry, field)}")
    try:
        return check_parity(model, bundle.model_path(role), entry.code_tokens, entry.precision, prompts)
    except ExportError as error:
        raise ExportError(f"{other}: {error}") from error


def check_parity(
    model: PreTrainedModel,
    path: Path,
    code_tokens: Sequence[int],
    precision: Precision,
    prompts: Sequence[npt.NDArray[np.int64]] = (),
) -> float:
    """The largest absolute error of a code logit or log-normalizer of an exported file, on random token trees and `prompts`.

    Raises ExportError when it is above TOLERANCE, or when the file cannot be loaded.
    """
    try:
        decoder = _open(model, path, RuntimeOptions())
    except BundleError as error:
        raise ExportError(str(error)) from error
    with rounded(model) if precision == "int8" else nullcontext():
        worst, largest = compare(model, decoder, code_tokens, prompts=prompts)
    _check_error(path, worst, largest, precision)
    return worst


def _check_error(path: Path, worst: float, largest: float, precision: Precision) -> None:
    if not worst <= TOLERANCE[precision] * max(1.0, largest):  # negated, so that NaN fails too
        raise ExportError(
            f"{path}: differs from its checkpoint by {worst:.2g} in a logit (the largest is {largest:.2g})"
        )
