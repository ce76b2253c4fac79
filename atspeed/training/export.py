"""Exports a Hugging Face checkpoint as an ONNX token-tree decoder, and checks it.

Plan invariance: the result of a token depends on its ancestors only, never on the other tokens of a pass. In float32 it is the
same bit for bit, since every sum has one order (atspeed/training/ordered_attention.py), and with int8 too
(atspeed/training/int8_graph.py). In float16 a pass of another size adds in another order, and differs by up to 1e-2. An int8
graph is a model of its own: its scores are close to the checkpoint's, and on a CPU its passes take half the time where
products dominate.

Decoders in a floating-point format have a second graph, for devices. In bfloat16 no CPU can run it, so it is not compared
with the checkpoint there. The host's graph then computes in float32 from the same weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging

from atspeed.engine.bundle.item_texts import ItemTexts
from atspeed.engine.bundle.manifest import Bundle, Head, Precision, Role
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.errors import BundleError
from atspeed.engine.model.bundle_check import check_finite
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.device_graph import DEVICE_FILE
from atspeed.engine.model.encoder_decoder import ENCODER_FILE, EncoderDecoder
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.decoder_graph import DecoderGraph, DecoderShape, FloatArithmetic, MakeArithmetic
from atspeed.training.device_graph import DeviceGraph
from atspeed.training.device_parity import compare_device
from atspeed.training.errors import TrainingError
from atspeed.training.generation import drop_generation_defaults
from atspeed.training.graph_builder import DATA_FILE, WeightFile
from atspeed.training.int8_graph import Int8Arithmetic, rounded
from atspeed.training.ordered_attention import OrderedArithmetic
from atspeed.training.parity import compare
from atspeed.training.t5_graph import ACTIVATIONS, ENCODER_DATA_FILE, OrderedProducts, T5DecoderGraph, T5EncoderGraph

MODEL_FILE = "model.onnx"
_REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Arguments of `from_pretrained` that return what does not fit, instead of an error that points to a log."""
ARCHITECTURES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3", "t5")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # the fields of Mixtral, Qwen and DeepSeek
STATIC_ROPE = ("default", "linear", "llama3", "yarn")

# The longest sequence of a T5 whose config has no n_positions: that of the original T5. Its position bias has no end.
_T5_POSITIONS = 512

# Largest error of a logit in the parity check, relative to the largest logit (or to 1, if that is larger). Rounding stays
# several times below these; a wrong mask, position, head order or weight is far above them. An int8 file is compared with its
# checkpoint computing from the same codes. The two usually agree to 1e-6. If float32 rounding moves an activation to another
# step in only one of them, errors reached 0.03 in random models with logits of 10 and more.
TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2, "int8": 1e-1}
STORED: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""The format of a precision's weights; int8 has codes."""


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
        head: the tokens whose logits the device graph computes; None for a model without one.
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
    head: Head | None = None
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
    head: Head = "vocab",
    texts: ItemTexts | None = None,
) -> ExportReport:
    """Write folder/model.onnx and folder/model.onnx.data, and check them against the model. A T5's encoder is beside them.

    Other models have a graph for devices, too, unless they are in int8.

    Args:
        model: float32, eval mode.
        folder: the folder to write into.
        code_tokens: the token id of each code column, [C].
        precision: the number format of the weights.
        prompt: whose tokens are tried as well.
        head: the tokens whose logits the device graph computes; see `head_of`.
        texts: the items' texts in prompts, whose tokens are tried too.

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
    error = _write_checked(model, folder, code_tokens, precision, (prompt, texts), head)
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
        head=head if has_device_graph(model.config, precision) else None,
        ordered_sums=precision == "float32",
    )


def head_of(rule: ScoringRule) -> Head:
    """Return the head that a scoring rule needs: only `vocab` sums over tokens that are no codes."""
    return "vocab" if rule is ScoringRule.VOCAB else "codes"


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
    prompts: tuple[PromptTemplate | None, ItemTexts | None],
    head: Head,
) -> float:
    """Write the files into a folder of their own, check them, and move them into place. Return the largest error."""
    partial = folder / ".export.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
        partial.mkdir(parents=True)
        write_graph(model, partial, code_tokens, precision, head)
        _check_finite(model, partial / MODEL_FILE, code_tokens, *prompts)
        error = check_parity(model, partial / MODEL_FILE, code_tokens, precision)
        if has_device_graph(model.config, precision):
            _check_device_graph(model, partial / DEVICE_FILE, code_tokens, precision, head)
        else:
            (folder / DEVICE_FILE).unlink(missing_ok=True)  # of another model, with other weights
        for name in (ENCODER_DATA_FILE, ENCODER_FILE, DATA_FILE, DEVICE_FILE, MODEL_FILE):
            if (partial / name).exists():
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
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError("config.rope_parameters.partial_rotary_factor: rotates a part of each head only")
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
    if config.is_encoder_decoder and precision == "int8":
        raise ExportError(f"precision: int8, a {config.model_type} is exported in float32 and float16 only")


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


def write_graph(
    model: PreTrainedModel, folder: Path, code_tokens: Sequence[int], precision: Precision, head: Head = "vocab"
) -> None:
    """Write the graphs and their weights. The weights are converted and written one at a time."""
    if model.config.is_encoder_decoder:
        with (folder / ENCODER_DATA_FILE).open("wb") as data:
            encoder = T5EncoderGraph(
                model, WeightFile(data, ENCODER_DATA_FILE), _arithmetic(model.config, precision)
            ).write_encoder()
        (folder / ENCODER_FILE).write_bytes(encoder.SerializeToString())
        onnx.checker.check_model(str(folder / ENCODER_FILE))
    with (folder / DATA_FILE).open("wb") as data:
        graphs = build_graphs(model, WeightFile(data), code_tokens, precision, head)
    for name, graph in graphs.items():
        (folder / name).write_bytes(graph.SerializeToString())
        onnx.checker.check_model(str(folder / name))


def build_graphs(
    model: PreTrainedModel,
    weights: WeightFile,
    code_tokens: Sequence[int],
    precision: Precision,
    head: Head = "vocab",
) -> dict[str, onnx.ModelProto]:
    """Build the graph of the host, and that of devices if the model has one, by file name; their weights go into one file."""
    graphs = {MODEL_FILE: _graph(model, precision, weights)}
    if has_device_graph(model.config, precision):
        graphs[DEVICE_FILE] = DeviceGraph(model, weights, STORED[precision], head)
    for graph in graphs.values():
        graph.write(code_tokens)
    return {name: graph.to_model(len(code_tokens)) for name, graph in graphs.items()}


def has_device_graph(config: Any, precision: Precision) -> bool:
    """Return whether a model of this config has a graph for devices; a T5 has none, and int8 is for CPUs."""
    return precision in STORED and not config.is_encoder_decoder


def _graph(model: PreTrainedModel, precision: Precision, weights: WeightFile) -> DecoderGraph:
    graph = T5DecoderGraph if model.config.is_encoder_decoder else DecoderGraph
    return graph(model, weights, _arithmetic(model.config, precision))


def _arithmetic(config: Any, precision: Precision) -> MakeArithmetic:
    """Return the arithmetic of the host's graph."""
    if precision == "int8":
        return Int8Arithmetic
    if precision == "float32":
        return (
            OrderedProducts
            if config.is_encoder_decoder
            else partial(OrderedArithmetic, max_positions=max_positions(config))
        )
    # The CPU has no products in bfloat16: the host's graph casts the weights when it is loaded.
    dtype = torch.float16 if precision == "float16" else torch.float32
    return partial(FloatArithmetic, dtype=dtype, stored=STORED[precision])


def _open(model: PreTrainedModel, path: Path, options: RuntimeOptions) -> Decoder:
    return EncoderDecoder(path, options) if model.config.is_encoder_decoder else Decoder(path, options)


def _check_finite(
    model: PreTrainedModel,
    path: Path,
    code_tokens: Sequence[int],
    prompt: PromptTemplate | None,
    texts: ItemTexts | None,
) -> None:
    """Raise ExportError when a pass over a token is not finite: the parity check asks a few random ones only."""
    try:
        decoder = _open(model, path, RuntimeOptions(intra_op_threads=torch.get_num_threads()))
        check_finite(decoder, code_tokens, prompt, texts, decoder_start=_decoder_start(model))
    except BundleError as error:
        raise ExportError(str(error)) from error


def _check_device_graph(
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
