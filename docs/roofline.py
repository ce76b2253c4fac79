"""Write the predicted times of docs/gpu.md: arithmetic with counted kernels, nothing measured.

`--check` fails when the tables are stale. The formula and its figures of a device are in atspeed/capacity/roofline.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atspeed.capacity.roofline import HOST, KERNELS, MOST_TOKENS, Pass
from atspeed.configuration.generated_page import write_or_check

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
ACCEPTANCE = ROOT / "docs" / "benchmarks" / "acceptance.json"
BEGIN, END = "<!-- predicted -->\n", "<!-- /predicted -->"

DRAFT = 3e-3  # seconds of draft and messages: assumed
PLANS = {"120": 120, "240": 240}  # nodes of a plan, by the `budget` of docs/benchmarks/acceptance.json
# K = 50 was not measured. Its first plan is two beam widths per level, and its passes are those of such a plan at K = 20; the
# second one is the largest of a graph, in one pass: the best that a draft could do.
WIDEST, LIKE, TWICE = 50, 20, "2k"
LEVELS = 4
PROMPT = 1000


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
        yield _row(Lists(name, WIDEST, MOST_TOKENS, 1.0))


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
