"""Predicted times of passes on a GPU: arithmetic with counted kernels.

A kernel takes the longest of three times: its bytes over the memory's speed, its operations over the processors' speed, and the
least time of any kernel. The kernels are those that tests/cuda counts. Nothing is measured. `docs/gpu.md` has the tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.model.device_pass import CAPACITY_BUCKETS, NEW_BUCKETS
from atspeed.training.inflation import SHAPES, ModelShape

# Kernels of a pass in float16: of a layer, and beside the layers. tests/cuda/test_device_graph.py counts them.
KERNELS = {"1.7b": (17, 20), "7b": (17, 18)}
_OTHER_KERNELS = (17, 20)
# Products of a layer (queries with keys and values, output, gate with up, down), and kernels that move keys and values.
PRODUCTS, MOVES = 4, 5  # two scatters, two gathers, attention

# An H200: what its memory and its processors reach, and assumed least times of a kernel and of a copy with its wait.
BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 4.3e12, 790e12
REPLAYED, EAGER = 2e-6, 5e-6  # seconds of the smallest kernel: in a CUDA graph, and launched by itself
COPY, LINK = 20e-6, 10e9  # seconds of a copy, and bytes per second from and to pageable memory
CODES = 768
HOST = 5.5e-6  # seconds of planning and selection for a node, on the host
MOST_TOKENS = NEW_BUCKETS[-1]
"""Tokens of the largest pass, padding included."""


@dataclass(frozen=True)
class Pass:
    """A pass of `new` tokens behind `prompt`, of one tree or several of this size.

    graph: replayed as a CUDA graph, padded to its bucket.
    """

    name: str
    prompt: int
    new: int
    graph: bool = True

    @property
    def seconds(self) -> float:
        """Predicted time."""
        return pass_seconds(SHAPES[self.name], KERNELS[self.name], self.prompt, self.new, graph=self.graph)

    @property
    def read(self) -> float:
        """Time of one read of the weights."""
        return read_bytes(SHAPES[self.name]) / BYTES_PER_SECOND


def read_bytes(shape: ModelShape) -> float:
    """Return the bytes of the weights that a pass reads, in float16."""
    inner = 2 * shape.head_dim * (shape.heads + shape.kv_heads) + 3 * shape.intermediate
    return 2.0 * shape.hidden * (shape.layers * inner + (shape.vocab_size or 0))


def pass_seconds(
    shape: ModelShape,
    kernels: tuple[int, int],
    prompt: int,
    new: int,
    *,
    trees: int = 1,
    graph: bool = True,
) -> float:
    """Return the predicted seconds of a pass over `trees` trees, each of `new` tokens behind `prompt`."""
    layer, beside = kernels
    places = prompt + new
    if graph:  # what no graph holds runs eagerly, unpadded
        new = next((size for size in NEW_BUCKETS if size >= new), new)
        places = next((size for size in CAPACITY_BUCKETS if size >= places), places)
    least = REPLAYED if graph else EAGER
    tokens = trees * new
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = [
        (width + 2 * kv_width) * shape.hidden,
        width * shape.hidden,
        2 * shape.hidden * shape.intermediate,
        shape.hidden * shape.intermediate,
    ]
    layers = sum(_kernel(2 * each, 2 * tokens * each, least) for each in weights)
    # A gather reads and writes the keys of every place for every head; attention reads them again.
    rows = 2 * trees * places * width
    layers += 2 * _kernel(2 * rows, 0, least) + _kernel(2 * rows, 4 * tokens * places * width, least) + 2 * least
    layers += (layer - PRODUCTS - MOVES) * least
    vocabulary = shape.vocab_size or 0
    head = _kernel(2 * vocabulary * shape.hidden, 2 * tokens * vocabulary * shape.hidden, least)
    head += _kernel(10 * tokens * vocabulary, 0, least) + (beside - 2) * least
    moved = 2 * COPY + (48 * tokens + 4 * trees * places + 4 * tokens * CODES) / LINK
    return shape.layers * layers + head + moved


def kernels_of(name: str | None) -> tuple[int, int]:
    """Return the kernels of a layer and beside the layers; those of 1.7B for models whose kernels were not counted."""
    return KERNELS.get(name or "", _OTHER_KERNELS)


def estimated_shape(model: ModelEntry) -> ModelShape:
    """Return a Llama's shape with this model's layers, keys, vocabulary and, nearly, its parameters.

    A manifest does not name the hidden size h. It follows from the parameters, with queries of width h and an MLP of 8/3 h:
    `parameters = layers * (10 h^2 + 2 h * kv_heads * head_dim) + vocab_size * h`.
    """
    kv_width = model.kv_heads * model.head_dim
    square, line = 10 * model.layers, 2 * model.layers * kv_width + model.vocab_size
    hidden = (-line + math.sqrt(line * line + 4 * square * model.parameters)) / (2 * square)
    heads = max(1, round(hidden / model.head_dim))
    return ModelShape(
        model.layers,
        heads * model.head_dim,
        round(8 / 3 * heads * model.head_dim),
        heads,
        model.kv_heads,
        model.head_dim,
        model.vocab_size,
    )


def _kernel(size: float, operations: float, least: float) -> float:
    return max(least, size / BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND)
