"""Count of nodes of random token trees whose bits differ in shared passes.

The trees are drawn in parts, each with a seed of its own. A run that was stopped continues where its result file ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from atspeed.benchmarks.results import Columns
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.invariance import TreeSizes, check_invariance
from atspeed.engine.model.loading import load_decoder

NAME = "invariance"


@dataclass(frozen=True)
class InvarianceRow:
    """Counts of one part, or of all parts of a model.

    Attributes:
        architecture, precision: of the target.
        threads: numbers of threads, one of which is drawn for every pass.
        prompt, nodes, batch: the longest prompt, the most nodes of a tree and the most trees of a pass.
        seed: seed of the part's trees.
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
    seed: int
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


@dataclass(frozen=True)
class CheckedModel:
    """A model whose trees are compared.

    Attributes:
        architecture, precision: as the manifest has them.
        decoders: the model, once for each number of threads.
        threads: these numbers.
        tokens: the tokens of trees, int64.
        positions: the most tokens of a path.
        decoder_start: the token that the decoder of an encoder-decoder model begins with.
    """

    architecture: str
    precision: str
    decoders: Sequence[Decoder]
    threads: tuple[int, ...]
    tokens: Int64
    positions: int
    decoder_start: int | None = None

    @classmethod
    def of_bundle(cls, bundle: Bundle, threads: Sequence[int]) -> CheckedModel:
        """Return the target of a bundle."""
        entry = bundle.model("target")
        return cls(
            architecture=entry.architecture,
            precision=entry.precision,
            decoders=[load_decoder(bundle, "target", RuntimeOptions(intra_op_threads=number)) for number in threads],
            threads=tuple(threads),
            tokens=np.asarray(sorted(set(entry.code_tokens)), dtype=np.int64),
            positions=entry.max_positions,
            decoder_start=entry.encoder.decoder_start if entry.encoder else None,
        )


@dataclass(frozen=True)
class TreeParts:
    """Random trees, in parts.

    Attributes:
        sizes: bounds of the trees.
        trees: trees of a model.
        part: trees of a part.
        seed: seed of the first part; each further part adds one.
    """

    sizes: TreeSizes
    trees: int
    part: int
    seed: int

    @property
    def seeds(self) -> range:
        """Return the seeds of the parts."""
        return range(self.seed, self.seed + -(-self.trees // self.part))


def run(model: CheckedModel, parts: TreeParts, done: Sequence[InvarianceRow] = ()) -> Iterator[InvarianceRow]:
    """Compare the parts that are not in `done`. Prompts are cut to the longest that the model has positions for."""
    made = {(row.architecture, row.seed) for row in done}
    longest = max(1, min(parts.sizes.prompt, model.positions - parts.sizes.depth))
    sizes = replace(parts.sizes, prompt=longest)
    for seed in parts.seeds:
        if (model.architecture, seed) in made:
            continue
        total = check_invariance(
            model.decoders, sizes, model.tokens, trees=parts.part, decoder_start=model.decoder_start, seed=seed
        )
        yield InvarianceRow(
            architecture=model.architecture,
            precision=model.precision,
            threads=model.threads,
            prompt=sizes.prompt,
            nodes=sizes.nodes,
            batch=sizes.trees,
            seed=seed,
            trees=total.trees,
            compared=total.nodes,
            moved=total.moved,
            prompts_moved=total.prompts_moved,
            largest=total.largest,
        )


def by_model(rows: Sequence[InvarianceRow]) -> list[InvarianceRow]:
    """Return the sum of each model's parts."""
    sums: dict[str, InvarianceRow] = {}
    for row in rows:
        known = sums.get(row.architecture)
        sums[row.architecture] = row if known is None else _sum(known, row)
    return list(sums.values())


def _sum(known: InvarianceRow, row: InvarianceRow) -> InvarianceRow:
    return replace(
        known,
        trees=known.trees + row.trees,
        compared=known.compared + row.compared,
        moved=known.moved + row.moved,
        prompts_moved=known.prompts_moved + row.prompts_moved,
        largest=max(known.largest, row.largest),
    )
