"""Models with random weights, made in memory in seconds.

What a pass costs does not depend on the values of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from onnx import TensorProto
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder, KvShape
from atspeed.engine.model.device_graph import DEVICE_FILE
from atspeed.training.architectures import STORED
from atspeed.training.export import MODEL_FILE, build_graphs
from atspeed.training.graph_builder import DATA_FILE, PAGE, WeightFile, onnx_type
from atspeed.training.inflation import ModelShape

PAGE_TOKENS = 8  # of a page of keys and values

_DIFFERENT = 2**24  # random numbers; larger weights repeat them
_STD = 0.02  # standard deviation of weights, that of LLaMA's initialisation


@dataclass(frozen=True)
class MadeModel:
    """Both graphs of a model, with the same weights.

    Attributes:
        host: the graph with KV in host memory.
        device: the graph with KV in pages.
        kv: the shape of keys and values.
        vocab_size: the number of tokens.
    """

    host: ModelFiles
    device: ModelFiles
    kv: KvShape
    vocab_size: int

    def on_host(self, options: RuntimeOptions) -> Decoder:
        """Load the graph with KV in host memory."""
        return Decoder(self.host.path, options, self.host)

    def on_device(self, options: RuntimeOptions, pool_mb: int) -> DeviceDecoder:
        """Load the graph with KV in pages. pool_mb: memory for them, in MiB."""
        return DeviceDecoder(self.device, options, self.kv, page_tokens=PAGE_TOKENS, pool_bytes=pool_mb * 2**20)


class _RandomWeights(WeightFile):
    """A file of weights that takes random numbers for every matrix, and never reads the one that it is given."""

    def __init__(self, file: BinaryIO, precision: Precision, seed: int) -> None:
        super().__init__(file)
        random = torch.randn(_DIFFERENT, generator=torch.Generator().manual_seed(seed)) * _STD
        self._random = random.to(STORED[precision])

    def add(self, tensor: Tensor) -> TensorProto:
        """Append random numbers in place of a matrix; norms, which are vectors or one vector per head, are kept."""
        if tensor.dim() != 2:
            return super().add(tensor)
        block, left = self._random.view(torch.uint8).numpy().data, tensor.numel() * tensor.element_size()
        self._file.write(bytes(-self._file.tell() % PAGE))
        offset = self._file.tell()
        for start in range(0, left, len(block)):
            self._file.write(block[: left - start])
        return self._proto(onnx_type(tensor.dtype), tensor.shape, offset, left)


def make_model(
    model: PreTrainedModel,
    precision: Precision,
    codes: int = 768,
    weights: Callable[[BinaryIO], WeightFile] = WeightFile,
) -> MadeModel:
    """Write a checkpoint's graphs into memory. codes: the number of code tokens, in the middle of the vocabulary."""
    config, file = model.config, BytesIO()
    first = (config.vocab_size - codes) // 2
    graphs = build_graphs(model, weights(file), range(first, first + codes), precision)
    content = {DATA_FILE: file.getvalue()}
    files = {name: ModelFiles(Path(name), graph.SerializeToString(), content) for name, graph in graphs.items()}
    kv = KvShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    return MadeModel(files[MODEL_FILE], files[DEVICE_FILE], kv, config.vocab_size)


def small_checkpoint(family: str, shape: ModelShape, seed: int) -> PreTrainedModel:
    """Make a checkpoint whose weights are as different as those of a trained one, for comparisons."""
    torch.manual_seed(seed)
    return _models().from_config(_config(family, shape, initializer_range=0.15)).eval()  # type: ignore[no-any-return]


def make_large(family: str, shape: ModelShape, precision: Precision, seed: int) -> MadeModel:
    """Make a model whose matrices all repeat one block of random numbers, as fast as memory is written."""
    with torch.device("meta"):
        model: PreTrainedModel = _models().from_config(_config(family, shape))
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.dim() < 2:
                setattr(module, name, _parameter(torch.ones(weight.shape)))
    # The tables are told apart by their addresses; nothing touches what is there.
    for table in (model.model.embed_tokens, model.lm_head):
        table.weight = _parameter(torch.empty(table.weight.shape, dtype=STORED[precision]))
    rotary: Any = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)
    return make_model(model, precision, weights=lambda file: _RandomWeights(file, precision, seed))


def _parameter(value: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value, requires_grad=False)


def _models() -> Any:
    return AutoModelForCausalLM


def _config(family: str, shape: ModelShape, **changes: float) -> Any:
    configs: Any = AutoConfig
    return configs.for_model(
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
        **changes,
    )
