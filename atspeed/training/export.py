"""Exports a Hugging Face checkpoint as an ONNX token-tree decoder, and checks it.

Plan invariance: the result of a token depends on its ancestors only, never on the other tokens of a pass. In float32 it is the
same bit for bit, since every float sum has one order (atspeed/training/ordered_attention.py), and in int8 too
(atspeed/training/int8_graph.py). In float16 a pass of another size adds in another order, and differs by up to 1e-2. An int8
graph is a model of its own: its scores are close to the checkpoint's, and on a CPU its passes take half the time where
products dominate.

Decoders in a floating-point format have a second graph, for devices. In bfloat16 no CPU can run it, so it is not compared
with the checkpoint there. The host's graph then computes in float32 from the same weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import PreTrainedModel

from atspeed.engine.bundle.item_texts import ItemTexts
from atspeed.engine.bundle.manifest import Head, Precision
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.model.device_graph import DEVICE_FILE
from atspeed.engine.model.encoder_decoder import ENCODER_FILE
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.architectures import STORED, check_supported, decoder_start, has_device_graph, max_positions
from atspeed.training.decoder_graph import DecoderGraph, DecoderShape, FloatArithmetic, MakeArithmetic, TrunkGraph
from atspeed.training.device_graph import DeviceGraph
from atspeed.training.errors import ExportError
from atspeed.training.export_checks import check_device_graph, check_parity, check_tokens
from atspeed.training.graph_builder import DATA_FILE, WeightFile
from atspeed.training.int8_graph import Int8Arithmetic
from atspeed.training.level_heads import Trunk
from atspeed.training.ordered_attention import OrderedArithmetic, ordered_form
from atspeed.training.t5_graph import ENCODER_DATA_FILE, OrderedProducts, T5DecoderGraph, T5EncoderGraph

MODEL_FILE = "model.onnx"


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
        heads: the heads of levels beside the decoder; 0 for a language model.
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
    heads: int = 0


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
    check_supported(model)
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
        decoder_start=decoder_start(model),
        head=head if _has_device_graph(model, precision) else None,
        ordered_sums=precision in ("float32", "int8"),
    )


def head_of(rule: ScoringRule) -> Head:
    """Return the head that a scoring rule needs: only `vocab` sums over tokens that are no codes."""
    return "vocab" if rule is ScoringRule.VOCAB else "codes"


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
        check_tokens(model, partial / MODEL_FILE, code_tokens, *prompts)
        error = check_parity(model, partial / MODEL_FILE, code_tokens, precision)
        if _has_device_graph(model, precision):
            check_device_graph(model, partial / DEVICE_FILE, code_tokens, precision, head)
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
    if _has_device_graph(model, precision):
        graphs[DEVICE_FILE] = DeviceGraph(model, weights, STORED[precision], head)
    for graph in graphs.values():
        graph.write(code_tokens)
    return {name: graph.to_model(len(code_tokens)) for name, graph in graphs.items()}


def _has_device_graph(model: PreTrainedModel, precision: Precision) -> bool:
    return has_device_graph(model.config, precision) and not isinstance(model, Trunk)


def _graph(model: PreTrainedModel, precision: Precision, weights: WeightFile) -> DecoderGraph:
    graph = T5DecoderGraph if model.config.is_encoder_decoder else DecoderGraph
    if isinstance(model, Trunk):
        graph = TrunkGraph
    return graph(model, weights, _arithmetic(model.config, precision))


def _arithmetic(config: Any, precision: Precision) -> MakeArithmetic:
    """Return the arithmetic of the host's graph."""
    if precision in ("float32", "int8"):
        if config.is_encoder_decoder:
            return OrderedProducts if precision == "float32" else Int8Arithmetic
        decoder = OrderedArithmetic if precision == "float32" else Int8Arithmetic
        return partial(decoder, form=ordered_form(max_positions(config)))
    # The CPU has no products in bfloat16: the host's graph casts the weights when it is loaded.
    dtype = torch.float16 if precision == "float16" else torch.float32
    return partial(FloatArithmetic, dtype=dtype, stored=STORED[precision])
