"""Graphs of large models without their weights: every weight is zero and takes no memory.

The graph is what `write_graph` writes, node by node. Its weights are a hole in a file, and the dry run drops the contents of
large copies to the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.model import decoder
from atspeed.engine.model.decoder import Decoder, RuntimeOptions, _session_options
from atspeed.training import decoder_graph
from atspeed.training.export import write_graph
from atspeed.training.inflation import ModelShape

CODE_TOKENS = range(1000, 1768)

# Small models of each family whose heads are as wide as those of large ones: kernels are chosen by the width of a head.
TINY = ModelShape(layers=2, hidden=512, intermediate=1024, heads=4, kv_heads=2, head_dim=128, vocab_size=4000)


def empty_model(family: str, shape: ModelShape, dtype: torch.dtype) -> PreTrainedModel:
    """Make a checkpoint of that shape in which only the two tables exist, and nobody has touched them."""
    configs: Any = AutoConfig
    models: Any = AutoModelForCausalLM
    config = configs.for_model(
        family,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: PreTrainedModel = models.from_config(config)
    for layer in (model.model.embed_tokens, model.lm_head):
        layer.weight = torch.nn.Parameter(torch.empty(layer.weight.shape, dtype=dtype), requires_grad=False)
    return model


@contextmanager
def without_weights() -> Iterator[None]:
    """Within the block, graphs are written with holes in place of weights."""
    with patch.object(decoder_graph.GraphBuilder, "tensor", _hole):
        yield


def _hole(graph: decoder_graph.GraphBuilder, tensor: Tensor) -> str:
    """Add a weight by its shape and type. Offsets are those of `GraphBuilder.tensor`."""
    name, data = f"weight_{len(graph.initializers)}", graph._data
    data.seek(-data.tell() % 4096, 1)
    proto = TensorProto(name=name, dims=tensor.shape, data_location=TensorProto.EXTERNAL)
    proto.data_type = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=tensor.dtype).numpy().dtype)
    place = {"location": decoder_graph.DATA_FILE, "offset": data.tell(), "length": tensor.nbytes}
    for key, value in place.items():
        proto.external_data.add(key=key, value=str(value))
    data.truncate(data.seek(tensor.nbytes, 1))
    graph.initializers.append(proto)
    return name


def write_shape(
    folder: Path,
    shape: ModelShape,
    precision: Precision,
    family: str = "llama",
    code_tokens: Sequence[int] = CODE_TOKENS,
) -> Path:
    """Write today's graph of that shape. Returns its path."""
    dtype = torch.float16 if precision == "float16" else torch.float32
    folder.mkdir(parents=True, exist_ok=True)
    with without_weights():
        write_graph(empty_model(family, shape, dtype), folder, code_tokens, precision)
    return folder / "model.onnx"


def open_shape(path: Path, options: RuntimeOptions | None = None) -> Decoder:
    """Open such a graph on the dry run's device. onnxruntime maps the file, so that its holes never come into memory."""

    def by_path(files: ModelFiles, options: RuntimeOptions, providers: Any) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(files.path), _session_options(options), providers=providers)

    with patch.object(decoder, "_session", by_path):
        return Decoder(path, options or RuntimeOptions(provider="cuda"), ModelFiles(path, b"", {}))
