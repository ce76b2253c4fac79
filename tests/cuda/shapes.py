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
from onnx import TensorProto
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atspeed.engine.bundle.manifest import Head, Precision
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.model import decoder
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder, KvShape
from atspeed.engine.model.device_graph import DEVICE_FILE
from atspeed.training.export import MODEL_FILE, write_graph
from atspeed.training.graph_builder import PAGE as ALIGNMENT
from atspeed.training.graph_builder import WeightFile, onnx_type
from atspeed.training.inflation import ModelShape

CODE_TOKENS = range(1000, 1768)
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PAGE = 8  # tokens of a page

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
    with patch.object(WeightFile, "add", _hole):
        yield


def _hole(weights: WeightFile, tensor: Tensor) -> TensorProto:
    """Add a weight by its shape and type, at the place where `WeightFile.add` puts it."""
    file, length = weights._file, tensor.numel() * tensor.element_size()
    offset = file.seek(-file.tell() % ALIGNMENT, 1)
    file.truncate(file.seek(length, 1))
    return weights._proto(onnx_type(tensor.dtype), tensor.shape, offset, length)


def write_shape(
    folder: Path,
    shape: ModelShape,
    precision: Precision,
    family: str = "llama",
    code_tokens: Sequence[int] = CODE_TOKENS,
    head: Head = "vocab",
) -> Path:
    """Write both graphs of that shape. Returns the path of the host's graph; DEVICE_FILE lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    with without_weights():
        write_graph(empty_model(family, shape, STORED[precision]), folder, code_tokens, precision, head)
    return folder / MODEL_FILE


def open_shape(path: Path, options: RuntimeOptions | None = None) -> Decoder:
    """Open such a graph of the host on the dry run's device."""
    with by_path():
        return Decoder(path, options or RuntimeOptions(provider="cuda"), ModelFiles(path, b"", {}))


def open_device_shape(path: Path, shape: ModelShape, pool_bytes: int = 1 << 30) -> DeviceDecoder:
    """Open the graph for devices that lies beside it."""
    files = ModelFiles(path.with_name(DEVICE_FILE), b"", {})
    kv = KvShape(shape.layers, shape.kv_heads, shape.head_dim)
    with by_path():
        return DeviceDecoder(files, RuntimeOptions(provider="cuda"), kv, page_tokens=PAGE, pool_bytes=pool_bytes)


@contextmanager
def by_path() -> Iterator[None]:
    """Within the block, onnxruntime opens graphs without bytes by their path, so that holes never come into memory."""
    plain = decoder._session

    def session(files: ModelFiles, options: RuntimeOptions, providers: Any) -> onnxruntime.InferenceSession:
        if files.graph:
            return plain(files, options, providers)
        settings = decoder._session_options(options)
        return onnxruntime.InferenceSession(str(files.path), settings, providers=providers)

    with patch.object(decoder, "_session", session):
        yield
