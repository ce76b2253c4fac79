"""A recommender over tables in place of models, with all that a catalogue may have, and what it must answer.

Paths end early and have scored tails, levels share tokens and differ in width, paths hold several items in an order of their own.
The target searches autonomously and prefetches; the draft is another table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import ROLES, Manifest
from atspeed.engine.bundle.prompts import Prompts
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.plan import Proposal
from atspeed.engine.search.scoring import Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, among
from atspeed.engine.speculation.autonomous_search import AutonomousSearch
from atspeed.engine.speculation.latency_model import LatencyModel
from atspeed.engine.speculation.target_prefetch import TargetPrefetcher
from orchestrator.model_clients.model_request import ModelRequest
from orchestrator.planning.planner import PlanLimits, Planner
from orchestrator.planning.usage import Usage
from orchestrator.recommend import Recommender
from orchestrator.recommendation import Recommendation, RecommendParams
from orchestrator.speculation_breaker import SpeculationBreaker
from tests.oracles.naive_trie import NaiveTrie, Path
from tests.oracles.simulation import FLAT, SimulatedDraft
from tests.oracles.worlds import World, run_now, run_steps
from tests.placeholder_bundles import placeholder_entry

SECONDS = 60.0


@dataclass(frozen=True)
class Tailed:
    """A catalogue by its definition.

    Attributes:
        naive: its paths, tails and ended places included.
        lengths: the codes of each item before its tail.
        tail_start: the first tail code of each level.
        rank: the order of the items of a path.
    """

    naive: NaiveTrie
    lengths: dict[str, int]
    tail_start: tuple[int, ...]
    rank: dict[str, int]

    def build(self) -> Catalogue:
        """The catalogue of these items."""
        ids = list(self.naive.items)
        codes, rank = np.array(list(self.naive.items.values())), np.array([self.rank[item] for item in ids])
        return Catalogue.build(ids, codes, self.naive.codebook_sizes, tail_start=self.tail_start, rank=rank)

    def items_of(self, path: Path) -> list[str]:
        """The items of a path, by rank and then by id."""
        return sorted(self.naive.items_of(path), key=lambda item: (self.rank[item], item))


def tailed(rng: np.random.Generator) -> Tailed:
    """Paths of one to three codes, any of which may begin another one, with one or two scored tokens behind them."""
    sizes, tails = rng.integers(1, 5, rng.integers(1, 4)).tolist(), int(rng.integers(1, 3))
    starts, lengths, paths, rank = [*sizes, *[0] * tails], {}, {}, {}
    for item in (f"item-{number}" for number in range(rng.integers(1, 25))):
        length = lengths[item] = int(rng.integers(1, len(sizes) + 1))
        tail = [starts[length + place] + place for place in range(tails)]
        paths[item] = (*(int(rng.integers(size)) for size in sizes[:length]), *tail, *[-1] * (len(sizes) - length))
        rank[item] = int(rng.integers(3))
    naive = NaiveTrie(paths, [sizes[0], *(start + tails for start in starts[1:])])
    return Tailed(naive, lengths, tuple(starts), rank)


@dataclass
class Target:
    """Stands for the target's client and its service: a table, an autonomous search and the prefetch of all requests."""

    world: World
    prefetcher: TargetPrefetcher
    passes: deque[Evaluation] = field(default_factory=deque)
    usage: Usage = field(default_factory=Usage)

    @property
    def has_next_pass(self) -> bool:
        return bool(self.passes)

    def session(
        self,
        request: ModelRequest,
        *,
        max_children: int | None,
        beam_widths: BeamWidths | None = None,
        prefetches: bool = False,
        speculates: bool = False,
    ) -> Target:
        self.request, self.limit, self.widths, self.prefetches = request, max_children or 1000, beam_widths, prefetches
        self.on_stream: set[int] = set()
        return self

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Answer the calls that `TargetSession` makes, as the service does."""
        self.usage.costs.append(PassStats())
        if self.passes and among(self.passes[0].node, nodes).all():
            return self.passes.popleft()
        assert not self.passes
        first, trie = not self.on_stream, self.world.trie
        asked = [node for node in trie.with_ancestors(nodes).tolist() if node not in self.on_stream]
        asked = [ROOT, *asked] if first else asked
        if self.widths is None or not first:
            return self._made(np.array(asked))
        ahead, noise = None, self.request.noise
        if noise is None:
            ahead = self.prefetcher.for_search(self.widths, self.request.pruning, 1, enabled=self.prefetches)
        search = AutonomousSearch(trie, self.world.rule, self.widths, noise, ahead)
        self.passes.extend(run_steps(search.steps(np.array(asked)), self._made))
        return self.passes.popleft()

    def _made(self, nodes: Int64) -> Evaluation:
        """One pass: of nodes that have a token, were not evaluated, and whose parents were."""
        held = set(nodes.tolist())
        assert held <= set(self.world.naive.inner())
        assert not held & self.on_stream
        self.on_stream |= held
        assert {int(self.world.trie.parent[node]) for node in held - {ROOT}} <= self.on_stream
        return self.world.evaluate(nodes, self.request.pruning, self.limit, self.request.noise)

    def close(self) -> None:
        self.passes.clear()


@dataclass
class Draft:
    """Stands for the draft's client: another table over the same catalogue."""

    world: World

    def session(self, request: ModelRequest, proposal: Proposal) -> SimulatedDraft:
        return SimulatedDraft(self.world, FLAT, proposal, request.noise, pruning=request.pruning)


def served(
    made: Tailed, rule: ScoringRule, seed: int, limit: int | None, agreement: float | None, nodes: float
) -> tuple[Recommender, World, World]:
    """Return a recommender, its target and its draft.

    The draft's logits are those of the target with noise; without a number there is no draft.

    nodes: of a plan, per beam and level; few of them leave out beams.
    """
    world = World.random(made.naive, rule, seed)
    world = replace(world, catalogue=made.build())
    rng, tokens = np.random.default_rng(seed + 1), list(world.tokens)
    noise = rng.normal(size=world.logits.shape).astype(np.float32)[:, [tokens.index(token) for token in tokens]]
    other = replace(world, logits=world.logits + (1 - (agreement or 0)) * noise, _evaluated={})
    entry = placeholder_entry("target", {}, world.trie.columns)
    manifest = Manifest(
        name="table",
        scoring_rule=rule,
        items_per_path=limit,
        catalogue_version=world.catalogue.version,
        target=entry,
        draft=entry,
        files={},
    )
    prefetcher = TargetPrefetcher(world.trie, rule, LatencyModel(FLAT.target), max_nodes=30)
    planner = Planner(world.trie, PlanLimits(nodes_per_beam=nodes))
    target, draft = cast("Any", Target(world, prefetcher)), cast("Any", None if agreement is None else Draft(other))
    prompts = dict.fromkeys(ROLES, Prompts.of(entry, world.catalogue))
    return (
        Recommender(manifest, world.catalogue, prompts, target, draft, planner, None, SpeculationBreaker()),
        world,
        other,
    )


Listed = list[tuple[str, float, Path, int]]


def ask(service: Recommender, params: RecommendParams) -> Recommendation:
    return run_now(service.recommend(params, Deadline(SECONDS)))


def items_of(made: Recommendation) -> Listed:
    return [(item.item_id, item.score, item.path, item.path_items) for item in made.items]


def expected(made: Tailed, leaves: Sequence[tuple[Path, float]], params: RecommendParams, limit: int | None) -> Listed:
    """Items of the leaves, by rank: without those that the request refuses, and at most the limit of each path."""
    most, found = params.items_per_path or limit, Listed()
    for path, score in leaves:
        every = made.items_of(path)
        left = [item for item in every if item not in params.excluded]
        left = [item for item in left if not params.allowed or item in params.allowed]
        found += [(item, score, path[: made.lengths[item]], len(every)) for item in left[:most]]
    return found[: params.k]
