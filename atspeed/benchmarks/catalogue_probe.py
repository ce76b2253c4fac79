"""Probe of one catalogue in its own process: load time, memory, selection.

    python -m atspeed.benchmarks.catalogue_probe FOLDER --k 20 --excluded 10000

The process imports what a service imports and does nothing else, so that its memory is that of the catalogue.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.scoring import Evaluation, ScoringRule, best_children
from atspeed.engine.search.trie import Pruning
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import Strict

_REPEATS = 7  # of which the median counts


@dataclass(frozen=True)
class Probe:
    """Cost of a catalogue for a process. Milliseconds are medians.

    Attributes:
        resident_bytes: memory that loading added.
        peak_bytes: the highest memory while it loaded, less that before.
        find_ms: time to look up many ids.
        exclude_ms, allow_ms: time to build the pruning without these items, and the pruning to them alone.
        constraint_ms: time per pass of a beam search to choose the best children of each node.
        selection_ms: time per pass of the rest of the search.
        excluded_constraint_ms, excluded_selection_ms: the same with these items excluded.
    """

    load_seconds: float
    resident_bytes: int
    peak_bytes: int
    find_ms: float
    exclude_ms: float
    allow_ms: float
    constraint_ms: float
    selection_ms: float
    excluded_constraint_ms: float
    excluded_selection_ms: float


@dataclass
class NoisyTarget:
    """Target with random logits. model_ns, constraint_ns: time of each pass for the logits, and to choose children."""

    catalogue: Catalogue
    rule: ScoringRule
    pruning: Pruning
    limit: int
    rng: np.random.Generator
    model_ns: list[int] = field(default_factory=list)
    constraint_ns: list[int] = field(default_factory=list)

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Make one pass; see `beam_loop.Target`."""
        trie, begun = self.catalogue.trie, time.perf_counter_ns()
        logits = self.rng.standard_normal((len(nodes), trie.columns), dtype=np.float32)
        mass = np.log(np.exp(logits).sum(axis=1))
        known = time.perf_counter_ns()
        found = best_children(trie, nodes, logits, mass, rule=self.rule, pruning=self.pruning, limit=self.limit)
        self.model_ns.append(known - begun)
        self.constraint_ns.append(time.perf_counter_ns() - known)
        return found


def probe(folder: Path, *, k: int, excluded: int, seed: int = 1) -> Probe:
    """Load the catalogue as a service does, and measure it."""
    before, begun = memory("VmRSS"), time.perf_counter()
    catalogue = Catalogue.load(folder)
    _ = catalogue.version  # services compute it to compare it with their bundle's
    catalogue.warm_up()
    seconds = time.perf_counter() - begun
    resident, peak = memory("VmRSS"), memory("VmHWM")
    rng = np.random.default_rng(seed)
    # An allow-list of fewer items than beams would make another search, so small catalogues keep half.
    chosen = rng.choice(catalogue.items, size=min(excluded, catalogue.items // 2), replace=False)
    ids = [catalogue.id_of(int(item)) for item in chosen]
    found = catalogue.find(ids)
    constraint, selection = _search_ms(catalogue, Pruning.none(), k, rng)
    pruned_constraint, pruned_selection = _search_ms(catalogue, catalogue.pruning(excluded=found), k, rng)
    return Probe(
        load_seconds=round(seconds, 3),
        resident_bytes=resident - before,
        peak_bytes=peak - before,
        find_ms=_median_ms(lambda: catalogue.find(ids)),
        exclude_ms=_median_ms(lambda: catalogue.pruning(excluded=found)),
        allow_ms=_median_ms(lambda: catalogue.pruning(allowed=found)),
        constraint_ms=constraint,
        selection_ms=selection,
        excluded_constraint_ms=pruned_constraint,
        excluded_selection_ms=pruned_selection,
    )


def memory(name: str) -> int:
    """Return a figure of this process's memory in bytes, by its name in Linux's /proc; 0 where there is no such file."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _search_ms(catalogue: Catalogue, pruning: Pruning, k: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return milliseconds per pass of a target-only search: to choose children, and for all else but the model."""
    constraint, rest = [], []
    for _ in range(_REPEATS):
        target = NoisyTarget(catalogue, ScoringRule.VOCAB, pruning, k, rng)
        begun = time.perf_counter_ns()
        asyncio.run(beam_search(catalogue.trie, ScoringRule.VOCAB, Strict(BeamWidths.of(k)), target, NoDraft()))
        total, passes = time.perf_counter_ns() - begun, len(target.model_ns)
        constraint.append(sum(target.constraint_ns) / passes)
        rest.append((total - sum(target.model_ns) - sum(target.constraint_ns)) / passes)
    return round(float(np.median(constraint)) / 1e6, 4), round(float(np.median(rest)) / 1e6, 4)


def _median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begun)
    return round(float(np.median(times)) / 1e6, 4)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--excluded", type=int, default=10_000)
    asked = parser.parse_args()
    found = probe(asked.folder, k=asked.k, excluded=asked.excluded)
    print(json.dumps(asdict(found), allow_nan=False))  # noqa: T201 - an answer


if __name__ == "__main__":
    main()
