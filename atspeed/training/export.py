"""Exports a Hugging Face checkpoint as an ONNX token-tree decoder, and checks it.

Plan invariance: the result of a token depends on its ancestors only, never on the other tokens of a pass. In float32 it is the
same bit for bit, since every sum has one order (atspeed/training/ordered_attention.py), and with int8 too
(atspeed/training/int8_graph.py). In float16 a pass of another size adds in another order, and differs by up to 1e-2. An int8
graph is a model of its own: its scores are close to the checkpoint's, and on a CPU its passes take half the time where
products dominate.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging

from atspeed.engine.bundle.manifest import Bundle, Precision, Role
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.errors import BundleError
from atspeed.engine.model.bundle_check import check_finite
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.encoder_decoder import ENCODER_FILE, EncoderDecoder
from atspeed.training.decoder_graph import DATA_FILE, DecoderGraph, DecoderShape, FloatArithmetic
from atspeed.training.errors import TrainingError
from atspeed.training.generation import drop_generation_defaults
from atspeed.training.int8_graph import Int8Arithmetic, rounded
from atspeed.training.ordered_attention import OrderedArithmetic
from atspeed.training.parity import compare
from atspeed.training.t5_graph import ACTIVATIONS, ENCODER_DATA_FILE, T5DecoderGraph, T5EncoderGraph

MODEL_FILE = "model.onnx"
_REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Arguments of `from_pretrained` that return what does not fit, instead of an error that points to a log."""
ARCHITECTURES = ("gemma", "llama", "mistral", "qwen2", "qwen3", "t5")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # the fields of Mixtral, Qwen and DeepSeek
STATIC_ROPE = ("default", "linear", "llama3", "yarn")

# The longest sequence of a T5 whose config has no n_positions: that of the original T5. Its position bias has no end.
_T5_POSITIONS = 512

# Largest error of a logit in the parity check, relative to the largest logit (or to 1, if that is larger). Rounding stays
# several times below these; a wrong mask, position, head order or weight is far above them. An int8 file is compared with its
# checkpoint computing from the same codes. The two usually agree to 1e-6. If float32 rounding moves an activation to another
# step in only one of them, errors reached 0.03 in random models with logits of 10 and more.
TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "float16": 2e-2, "int8": 1e-1}


class ExportError(TrainingError):
    """A checkpoint that cannot be exported, or an export that computes something else than its checkpoint."""


@dataclass(frozen=True)
class ExportReport:
    """The properties of an exported model.

    Attributes:
        architecture: the model type of the checkpoint.
        precision: the number format.
        parameters: the number of weights.
        vocab_size: the size of the vocabulary.
        layers: the number of layers.
        kv_heads: heads of keys and values.
        head_dim: the size of a head.
        max_positions: the longest sequence.
        max_logit_error: the largest absolute difference in the parity check.
        decoder_start: the token that a decoder with an encoder begins with; None for a decoder alone.
        ordered_sums: true if every float sum has one order.
    """

    architecture: str
    precision: Precision
    parameters: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    max_positions: int
    max_logit_error: float
    decoder_start: int | None = None
    ordered_sums: bool = False


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


def export_decoder(
    model: PreTrainedModel,
    folder: Path,
    *,
    code_tokens: Sequence[int],
    precision: Precision = "float32",
    prompt: PromptTemplate | None = None,
) -> ExportReport:
    """Write folder/model.onnx and folder/model.onnx.data, and check them against the model. A T5's encoder is beside them.

    model: float32, eval mode. code_tokens: the token id of each code column, [C]. prompt: whose tokens are tried as well.
    Raises ExportError, naming the config field, when the model has something that the graph does not, naming the token, when
    a pass over it is not finite, and when the parity check fails. The files take the place of what is there once they are
    checked; otherwise nothing changes.
    """
    check_supported(model, precision)
    shape = DecoderShape.of(model)
    if not code_tokens:
        raise ExportError("code_tokens: must be at least one")
    if min(code_tokens) < 0 or max(code_tokens) >= shape.vocab_size:
        raise ExportError(f"code_tokens: a token id is outside the vocabulary of {shape.vocab_size}")
    error = _write_checked(model, folder, code_tokens, precision, prompt)
    return ExportReport(
        architecture=model.config.model_type,
        precision=precision,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=shape.vocab_size,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_positions=max_positions(model.config),
        max_logit_error=error,
        decoder_start=_decoder_start(model),
        ordered_sums=precision == "float32",
    )


def max_positions(config: Any) -> int:
    """Return the longest sequence of a model, prompt and codes together."""
    if config.is_encoder_decoder:
        return int(getattr(config, "n_positions", None) or _T5_POSITIONS)
    return int(config.max_position_embeddings)


def _decoder_start(model: PreTrainedModel) -> int | None:
    return model.config.decoder_start_token_id if model.config.is_encoder_decoder else None


def _write_checked(
    model: PreTrainedModel,
    folder: Path,
    code_tokens: Sequence[int],
    precision: Precision,
    prompt: PromptTemplate | None,
) -> float:
    """Write the files into a folder of their own, check them, and move them into place. Return the largest error."""
    partial = folder / ".export.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
        partial.mkdir(parents=True)
        write_graph(model, partial, code_tokens, precision)
        _check_finite(model, partial / MODEL_FILE, code_tokens, prompt)
        error = check_parity(model, partial / MODEL_FILE, code_tokens, precision)
        for name in (ENCODER_DATA_FILE, ENCODER_FILE) if model.config.is_encoder_decoder else ():
            (partial / name).replace(folder / name)
        for name in (DATA_FILE, MODEL_FILE):
            (partial / name).replace(folder / name)
    except ExportError as failure:
        raise ExportError(str(failure).replace(str(partial), str(folder))) from failure
    except OSError as failure:
        raise ExportError(f"{folder}: not written: {failure.strerror or failure}") from failure
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return error


def check_architecture(config: Any) -> None:
    """Raise ExportError, naming the config field, when no graph would compute what a model of this config computes."""
    if any(getattr(config, field, None) for field in _EXPERTS):
        raise ExportError(f"config.model_type: {config.model_type!r} is a mixture of experts, which no graph computes")
    if config.model_type not in ARCHITECTURES:
        raise ExportError(f"config.model_type: {config.model_type!r}, supported are {', '.join(ARCHITECTURES)}")
    if config.model_type == "t5":
        _check_t5(config)
        return
    activation = "gelu_pytorch_tanh" if config.model_type == "gemma" else "silu"
    if config.hidden_act != activation:
        raise ExportError(f"config.hidden_act: {config.hidden_act!r}, supported is {activation!r}")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in STATIC_ROPE:
        raise ExportError(f"config.rope_parameters.rope_type: {rope_type!r}, supported are {', '.join(STATIC_ROPE)}")
    window = getattr(config, "sliding_window", None)
    # Mistral has no layer types: every layer slides. Llama has neither field.
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    if window is not None and slides and window < config.max_position_embeddings:
        raise ExportError(f"config.sliding_window: {window}, attention must see the whole sequence")


def check_supported(model: PreTrainedModel, precision: Precision = "float32") -> None:
    """Raise ExportError, naming the config field, when the graph would not compute what the model computes."""
    check_architecture(model.config)
    check_precision(model.config, precision)
    if (
        not model.config.is_encoder_decoder
        and 2 * len(model.model.rotary_emb.inv_freq) != DecoderShape.of(model).head_dim
    ):
        raise ExportError("config.rope_parameters: rotates a part of each head only")
    if model.dtype != torch.float32 or model.training:
        raise ExportError(f"model: must be float32 and in eval mode, is {model.dtype}, training={model.training}")


def check_precision(config: Any, precision: Precision) -> None:
    """Raise ExportError when a model of this config has no graph in a precision."""
    if config.is_encoder_decoder and precision != "float32":
        raise ExportError(f"precision: {precision}, a {config.model_type} is exported in float32 only")


def _check_t5(config: Any) -> None:
    if not config.is_encoder_decoder:
        raise ExportError("config.is_encoder_decoder: false, a t5 needs its encoder and its decoder")
    if config.dense_act_fn not in ACTIVATIONS:
        raise ExportError(f"config.feed_forward_proj: {config.dense_act_fn!r}, supported are {', '.join(ACTIVATIONS)}")
    start = config.decoder_start_token_id
    if start is None or not 0 <= start < config.vocab_size:
        raise ExportError(
            f"config.decoder_start_token_id: {start}, must be a token of the vocabulary of {config.vocab_size}"
        )


def write_graph(model: PreTrainedModel, folder: Path, code_tokens: Sequence[int], precision: Precision) -> None:
    """Write the two files of each graph. The weights are converted and written one at a time."""
    if model.config.is_encoder_decoder:
        with (folder / ENCODER_DATA_FILE).open("wb") as data:
            encoder = T5EncoderGraph(model, data).write_encoder()
        (folder / ENCODER_FILE).write_bytes(encoder.SerializeToString())
        onnx.checker.check_model(str(folder / ENCODER_FILE))
    with (folder / DATA_FILE).open("wb") as data:
        graph = _graph(model, precision, data)
        graph.write(code_tokens)
    (folder / MODEL_FILE).write_bytes(graph.to_model(len(code_tokens)).SerializeToString())
    onnx.checker.check_model(str(folder / MODEL_FILE))


def _graph(model: PreTrainedModel, precision: Precision, data: BinaryIO) -> DecoderGraph:
    if model.config.is_encoder_decoder:
        return T5DecoderGraph(model, data)
    if precision == "int8":
        return DecoderGraph(model, data, Int8Arithmetic)
    if precision == "float16":
        return DecoderGraph(model, data, partial(FloatArithmetic, dtype=torch.float16))
    return DecoderGraph(model, data, partial(OrderedArithmetic, max_positions=max_positions(model.config)))


def _open(model: PreTrainedModel, path: Path, options: RuntimeOptions) -> Decoder:
    return EncoderDecoder(path, options) if model.config.is_encoder_decoder else Decoder(path, options)


def _check_finite(
    model: PreTrainedModel, path: Path, code_tokens: Sequence[int], prompt: PromptTemplate | None
) -> None:
    """Raise ExportError when a pass over a token is not finite: the parity check asks a few random ones only."""
    try:
        decoder = _open(model, path, RuntimeOptions(intra_op_threads=torch.get_num_threads()))
        check_finite(decoder, code_tokens, prompt, decoder_start=_decoder_start(model))
    except BundleError as error:
        raise ExportError(str(error)) from error


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
    if not worst <= TOLERANCE[precision] * max(1.0, largest):  # negated, so that NaN fails too
        raise ExportError(
            f"{path}: differs from its checkpoint by {worst:.2g} in a logit (the largest is {largest:.2g})"
        )
    return worst
