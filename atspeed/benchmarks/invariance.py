"""Count of nodes that company moves by a bit, on random token trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from atspeed.benchmarks.results import Columns
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.invariance import TreeSizes, check_invariance
from atspeed.engine.model.loading import load_decoder


@dataclass(frozen=True)
class InvarianceRow:
    """Counts of one model.

    Attributes:
        architecture, precision: of the target.
        threads: numbers of threads, one of which is drawn for every pass.
        prompt, nodes, batch: the longest prompt, the most nodes of a tree and the most trees of a pass.
        trees, compared: numbers of compared trees and nodes.
        moved, prompts_moved: nodes and prompts with another bit.
        largest: the largest difference in a logit.
    """

    architecture: str
    precision: str
    threads: tuple[int, ...]
    prompt: int
    nodes: int
    batch: int
    trees: int
    compared: int
    moved: int
    prompts_moved: int
    largest: float


COLUMNS: Columns[InvarianceRow] = (
    ("model", lambda row: f"{row.architecture} {row.precision}"),
    ("trees", lambda row: f"{row.trees:,}"),
    ("nodes compared", lambda row: f"{row.compared:,}"),
    ("nodes moved", lambda row: f"{row.moved:,}"),
    ("prompts moved", lambda row: f"{row.prompts_moved:,}"),
    ("largest difference", lambda row: f"{row.largest:.1e}"),
)


def run(bundle: Bundle, sizes: TreeSizes, *, trees: int, threads: Sequence[int], seed: int) -> InvarianceRow:
    """Compare at least so many random trees. Prompts are cut to the longest that the target has positions for."""
    entry = bundle.model("target")
    start = entry.encoder.decoder_start if entry.encoder else None
    decoders = [load_decoder(bundle, "target", RuntimeOptions(intra_op_threads=number)) for number in threads]
    longest = max(1, min(sizes.prompt, entry.max_positions - sizes.depth))
    sizes = replace(sizes, prompt=longest)
    tokens = np.asarray(sorted(set(entry.code_tokens)), dtype=np.int64)
    total = check_invariance(decoders, sizes, tokens, trees=trees, decoder_start=start, seed=seed)
    return InvarianceRow(
        architecture=entry.architecture,
        precision=entry.precision,
        threads=tuple(threads),
        prompt=sizes.prompt,
        nodes=sizes.nodes,
        batch=sizes.trees,
        trees=total.trees,
        compared=total.nodes,
        moved=total.moved,
        prompts_moved=total.prompts_moved,
        largest=total.largest,
    )
