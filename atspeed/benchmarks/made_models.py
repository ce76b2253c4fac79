"""Models with random weights, made in memory in seconds.

What a pass costs does not depend on the values of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder, KvShape
from atspeed.engine.model.device_graph import DEVICE_FILE
from atspeed.training.export import MODEL_FILE, STORED, build_graphs
from atspeed.training.graph_builder import DATA_FILE, WeightFile
from atspeed.training.inflation import ModelShape

PAGE_TOKENS = 8  # of a page of keys and values

_DIFFERENT = 2**24  # random numbers; larger weights repeat them
_APART = 64  # numbers between the beginnings of two modules' weights
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


def make_model(model: PreTrainedModel, precision: Precision, codes: int = 768) -> MadeModel:
    """Write a checkpoint's graphs into memory. codes: the number of code tokens, in the middle of the vocabulary."""
    config, file = model.config, BytesIO()
    first = (config.vocab_size - codes) // 2
    graphs = build_graphs(model, WeightFile(file), range(first, first + codes), precision)
    weights = {DATA_FILE: file.getvalue()}
    files = {name: ModelFiles(Path(name), graph.SerializeToString(), weights) for name, graph in graphs.items()}
    kv = KvShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    return MadeModel(files[MODEL_FILE], files[DEVICE_FILE], kv, config.vocab_size)


def small_checkpoint(family: str, shape: ModelShape, seed: int) -> PreTrainedModel:
    """Make a checkpoint whose weights are as different as those of a trained one, for comparisons."""
    torch.manual_seed(seed)
    return _models().from_config(_config(family, shape, initializer_range=0.15)).eval()  # type: ignore[no-any-return]


def large_checkpoint(family: str, shape: ModelShape, precision: Precision, seed: int) -> PreTrainedModel:
    """Make a checkpoint whose weights all share one block of random numbers, so that it is made in no time and no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = _models().from_config(_config(family, shape))
    rotary: Any = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)  # computed from the config, and not on `meta`
    modules = list(model.modules())
    length = max(weight.numel() for weight in model.parameters()) + _APART * len(modules)
    random = torch.randn(min(_DIFFERENT, length), generator=torch.Generator().manual_seed(seed)) * _STD
    block = random.to(STORED[precision]).repeat(-(-length // len(random)))
    for number, module in enumerate(modules):
        for name, weight in list(module.named_parameters(recurse=False)):
            # Each module begins elsewhere: a table at the address of another would be taken for a tied one.
            shared = block[_APART * number :][: weight.numel()].view(weight.shape)
            made = torch.ones_like(shared) if "norm" in type(module).__name__.lower() else shared
            setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
    return model


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
