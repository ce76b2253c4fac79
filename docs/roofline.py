"""Write the predicted times of docs/gpu.md: arithmetic with counted kernels, nothing measured.

`--check` fails when the tables are stale. The kernels are those that tests/cuda counts. A kernel takes the longest of three
times: its bytes over the memory's speed, its operations over the processors' speed, and the least time of any kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atspeed.configuration.generated_page import write_or_check
from atspeed.engine.model.device_pass import CAPACITY_BUCKETS, NEW_BUCKETS
from atspeed.training.inflation import SHAPES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
ACCEPTANCE = ROOT / "docs" / "benchmarks" / "acceptance.json"
BEGIN, END = "<!-- predicted -->\n", "<!-- /predicted -->"

# Kernels of a pass in float16: of a layer, and beside the layers. tests/cuda/test_device_graph.py counts them.
KERNELS = {"1.7b": (17, 20), "7b": (17, 18)}
# Products of a layer (queries with keys and values, output, gate with up, down), and kernels that move keys and values.
PRODUCTS, MOVES = 4, 5  # two scatters, two gathers, attention

# An H200: what its memory and its processors reach, and assumed least times of a kernel and of a copy with its wait.
BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 4.3e12, 790e12
REPLAYED, EAGER = 2e-6, 5e-6  # seconds of the smallest kernel: in a CUDA graph, and launched by itself
COPY, LINK = 20e-6, 10e9  # seconds of a copy, and bytes per second from and to pageable memory
CODES = 768
DRAFT = 3e-3  # seconds of draft and messages: assumed
HOST = 5.5e-6  # seconds of planning and selection for a node, on the host
PLANS = {"120": 120, "240": 240}  # nodes of a plan, by the `budget` of docs/benchmarks/acceptance.json
# K = 50 was not measured. Its first plan is two beam widths per level, and its passes are those of such a plan at K = 20; the
# second one is the largest of a graph, in one pass: the best that a draft could do.
WIDEST, LIKE, TWICE = 50, 20, "2k"
LEVELS = 4
PROMPT = 1000


@dataclass(frozen=True)
class Pass:
    """A pass of `new` tokens behind `prompt`. graph: replayed as a CUDA graph, padded to its bucket."""

    name: str
    prompt: int
    new: int
    graph: bool = True

    @property
    def seconds(self) -> float:
        """Predicted time."""
        shape, (layer, beside) = SHAPES[self.name], KERNELS[self.name]
        new, places = self.new, self.prompt + self.new
        if self.graph:
            new = next(size for size in NEW_BUCKETS if size >= new)
            places = next(size for size in CAPACITY_BUCKETS if size >= places)
        least = REPLAYED if self.graph else EAGER
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        weights = [
            (width + 2 * kv_width) * shape.hidden,
            width * shape.hidden,
            2 * shape.hidden * shape.intermediate,
            shape.hidden * shape.intermediate,
        ]
        layers = sum(_kernel(2 * each, 2 * new * each, least) for each in weights)
        # A gather reads and writes the keys of every place for every head; attention reads them again.
        rows = 2 * places * width
        layers += 2 * _kernel(2 * rows, 0, least) + _kernel(2 * rows, 4 * new * places * width, least) + 2 * least
        layers += (layer - PRODUCTS - MOVES) * least
        vocabulary = shape.vocab_size or 0
        head = _kernel(2 * vocabulary * shape.hidden, 2 * new * vocabulary * shape.hidden, least)
        head += _kernel(10 * new * vocabulary, 0, least) + (beside - 2) * least
        moved = 2 * COPY + (48 * new + 4 * places + 4 * new * CODES) / LINK
        return shape.layers * layers + head + moved

    @property
    def read(self) -> float:
        """Time of one read of the weights."""
        shape = SHAPES[self.name]
        inner = 2 * shape.head_dim * (shape.heads + shape.kv_heads) + 3 * shape.intermediate
        return 2 * shape.hidden * (shape.layers * inner + (shape.vocab_size or 0)) / BYTES_PER_SECOND


def _kernel(size: float, operations: float, least: float) -> float:
    return max(least, size / BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND)


@dataclass(frozen=True)
class Lists:
    """A list of K items: one pass per level, or the passes of `strict` with a plan of so many nodes."""

    name: str
    k: int
    plan: int
    passes: float

    @property
    def plain(self) -> float:
        """Predicted seconds of plain beam search: the root, then K beams a level."""
        level = Pass(self.name, PROMPT, self.k).seconds + HOST * self.k
        return Pass(self.name, PROMPT, 1).seconds + (LEVELS - 1) * level

    @property
    def strict(self) -> float:
        """Predicted seconds of `strict`: draft and messages once for each pass."""
        return self.passes * (Pass(self.name, PROMPT, self.plan).seconds + HOST * self.plan + DRAFT)


def tables() -> str:
    """Return both tables as Markdown."""
    return "\n".join([*_passes(), "", *_lists(), ""])


def _passes() -> Iterator[str]:
    yield "| model, nodes behind 1,000 tokens | one read of the weights, ms | CUDA graph, ms | eager, ms |"
    yield "|---|---|---|---|"
    for name in KERNELS:
        for new in (1, 40, 120, 240, 512):
            replayed, eager = (Pass(name, PROMPT, new, graph=graph).seconds for graph in (True, False))
            read = Pass(name, PROMPT, new).read
            yield f"| {name}, {new} | {1e3 * read:.2f} | {1e3 * replayed:.1f} | {1e3 * eager:.1f} |"


def _lists() -> Iterator[str]:
    yield "| model, K | plan | passes of `strict` | plain beam search, ms | `strict`, ms | plain / `strict` |"
    yield "|---|---|---|---|---|---|"
    measured = json.loads(ACCEPTANCE.read_text(encoding="utf-8"))["rows"]
    strict = {(row["k"], row["budget"]): row["target_passes_mean"] for row in measured if row["mode"] == "strict"}
    for name in KERNELS:
        for k in (5, 10, 20):
            yield _row(
                min((Lists(name, k, PLANS[each], strict[k, each]) for each in PLANS), key=lambda one: one.strict)
            )
        yield _row(Lists(name, WIDEST, 2 * WIDEST * (LEVELS - 1), strict[LIKE, TWICE]))
        yield _row(Lists(name, WIDEST, NEW_BUCKETS[-1], 1.0))


def _row(found: Lists) -> str:
    return (
        f"| {found.name}, {found.k} | {found.plan} | {found.passes:.2f} | {1e3 * found.plain:.1f} "
        f"| {1e3 * found.strict:.1f} | {found.plain / found.strict:.1f} |"
    )


def page() -> str:
    """Return the page with new tables."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}{tables()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page(), "make gpu-page"))
