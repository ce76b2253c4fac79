"""Target prefetch: the same lists, and fewer passes where that saves time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.arrays import Int64
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning
from atspeed.engine.speculation.autonomous_search import AutonomousSearch
from atspeed.engine.speculation.latency_model import LatencyModel, Pass
from atspeed.engine.speculation.prefix_prior import PrefixPrior
from atspeed.engine.speculation.target_prefetch import TargetPrefetcher
from tests.catalogues import random_catalogue
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import World, beam_widths, naive_tries
from tests.profiles import either


def latency_of(floor_ms: float, ms_per_token: float, *, occupancy: int = 1) -> LatencyModel:
    """Return the latency of passes that take so long. occupancy: requests of the same size that share each pass."""
    curve = CostCurve.smoothed([1, 1001], [0], 1e6 * (floor_ms + ms_per_token * np.array([[1.0], [1001.0]])))
    latency = LatencyModel(curve)
    for _ in range(200):
        forward = int(curve.predict(10 * occupancy))
        cost = PassStats(forward_ns=forward, new_tokens=10, batch_requests=occupancy, batch_tokens=10 * occupancy)
        latency.observe([Pass(10, 0, 10)], cost, forward)
    return latency


def milliseconds(latency: LatencyModel, passes: Sequence[Int64]) -> float:
    return sum(float(latency.curve.predict(len(nodes))) for nodes in passes) / 1e6


FLAT, STEEP = (10.0, 0.0), (0.01, 1.0)


def searched(
    world: World, widths: BeamWidths, pruning: Pruning, prefetcher: TargetPrefetcher | None, *, enabled: bool = True
) -> tuple[Beams, list[Int64]]:
    """Return a search's list and the nodes of each pass."""
    ahead = prefetcher.for_search(widths, pruning, prompt_tokens=0, enabled=enabled) if prefetcher else None
    search, passes = AutonomousSearch(world.trie, world.rule, widths, prefetcher=ahead), list[Int64]()
    steps = search.steps(np.array([ROOT]))
    nodes = next(steps)
    while True:
        passes.append(nodes)
        try:
            nodes = steps.send(world.evaluate(nodes, pruning, limit=widths.largest))
        except StopIteration:
            return search.beams, passes


def users(naive: NaiveTrie, rule: ScoringRule, count: int, noise: float) -> list[World]:
    """Return users with logits of their own on the first level, and nearly the same ones below it."""
    shared, worlds = World.random(naive, rule, seed=0), []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        logits = shared.logits + noise * rng.normal(size=shared.logits.shape)
        logits[ROOT] = 2.0 * rng.normal(size=logits.shape[1])
        normalizer = np.log(np.exp(logits).sum(axis=1) + 1)
        floats = (logits.astype(np.float32), normalizer.astype(np.float32))
        worlds.append(World(naive, shared.catalogue, rule, *floats))
    return worlds


@settings(max_examples=either(20, 60))
@given(
    naive_tries(levels=(1, 2, 3, 4), max_items=30),
    st.sampled_from(ScoringRule),
    beam_widths,
    st.sampled_from([FLAT, STEEP, (3.0, 1.0)]),
    st.data(),
)
def test_prefetch_of_any_nodes_keeps_every_list(
    naive: NaiveTrie, rule: ScoringRule, widths: BeamWidths, machine: tuple[float, float], data: st.DataObject
) -> None:
    """No pass holds a node twice, or a node whose parent is not evaluated."""
    items, prefetcher = sorted(naive.items), None
    for world in users(naive, rule, count=12, noise=data.draw(st.sampled_from([0.0, 0.5, 3.0]))):
        prefetcher = prefetcher or TargetPrefetcher(
            world.trie, rule, latency_of(*machine), max_nodes=data.draw(st.integers(1, 40))
        )
        pruning = world.pruning(data.draw(st.lists(st.sampled_from(items), max_size=len(items) - 1, unique=True)))
        expected, _ = searched(world, widths, pruning, None)
        found, passes = searched(world, widths, pruning, prefetcher)
        assert found.node.tolist() == expected.node.tolist()
        assert found.score.tolist() == expected.score.tolist()
        evaluated: set[int] = set()
        for nodes in passes:
            assert (np.diff(nodes) > 0).all()
            assert pruning.live(nodes).all()
            assert not evaluated & set(nodes.tolist())
            evaluated |= set(nodes.tolist())
            known = np.array(sorted(evaluated))
            assert np.isin(world.trie.parent[nodes[nodes != ROOT]], known).all()


def naive_catalogue() -> NaiveTrie:
    catalogue = random_catalogue(400, (12, 10, 8, 8), seed=3)
    items = {catalogue.id_of(item): tuple(catalogue.codes[item].tolist()) for item in range(catalogue.items)}
    return NaiveTrie(items, (12, 10, 8, 8))


@pytest.mark.parametrize(("machine", "noise"), [(FLAT, 0.1), ((10.0, 0.3), 0.1), (STEEP, 0.1), ((10.0, 2.0), 3.0)])
def test_prefetched_levels_need_no_pass(machine: tuple[float, float], noise: float) -> None:
    """If passes pay by the token, or users differ, prefetch costs next to nothing."""
    widths, latency, took, alone, made = (
        BeamWidths.of(6),
        latency_of(*machine),
        list[float](),
        list[float](),
        list[int](),
    )
    worlds = users(naive_catalogue(), ScoringRule.VOCAB, count=120, noise=noise)
    prefetcher = TargetPrefetcher(worlds[0].trie, ScoringRule.VOCAB, latency, max_nodes=100)
    for number, world in enumerate(worlds):
        _, plain = searched(world, widths, Pruning.none(), None)
        _, passes = searched(world, widths, Pruning.none(), prefetcher)
        if number >= 80:
            made.append(len(passes))
            alone.append(milliseconds(latency, plain))
            took.append(milliseconds(latency, passes))
    if machine is STEEP or noise > 1:
        assert np.mean(took) <= 1.01 * np.mean(alone)
    else:
        assert np.mean(made) < 3.2
        assert np.mean(took) < 0.9 * np.mean(alone)


def test_prefix_prior_is_the_mean_of_evaluated_probabilities() -> None:
    """One imagined request counts too: its probability is the share of the items below."""
    naive, width = naive_catalogue(), 5
    worlds = users(naive, ScoringRule.VOCAB, count=9, noise=1.0)
    trie, prior = worlds[0].trie, PrefixPrior(worlds[0].trie, ScoringRule.VOCAB)
    returned: dict[int, list[dict[int, float]]] = {}
    for world in worlds:
        parents = trie.children(ROOT)[:4].astype(np.int64)
        evaluated = dict(world.evaluate(parents, Pruning.none(), limit=width).items())
        prior.learn(evaluated, Pruning.none())
        for node, children in evaluated.items():
            said = dict(zip(children.node.tolist(), np.exp(children.logp).tolist(), strict=True))
            returned.setdefault(node, []).append(said)
    beams = Beams(parents[:1], np.array([-1.5]), np.array([-1.5]), np.array([-1.5]))
    plan = prior.plan(beams, {}, BeamWidths.of(width), 1000, Pruning.none())
    plan.check(trie, limit=1000)
    parent = int(parents[0])
    for child in trie.children(parent).tolist():
        share = _items_below(naive, child) / _items_below(naive, parent)
        mean = (sum(said.get(child, 0.0) for said in returned[parent]) + share) / (len(returned[parent]) + 1)
        (score,) = plan.score[plan.node == child]
        assert score == pytest.approx(-1.5 + math.log(mean), abs=1e-5)


def _items_below(naive: NaiveTrie, node: int) -> int:
    path = naive.nodes[node]
    return len({own for own in naive.items.values() if own[: len(path)] == path})


@pytest.mark.parametrize("way", ["excluded", "allowed"])
def test_prefix_prior_learns_nothing_of_pruned_nodes(way: str) -> None:
    naive = naive_catalogue()
    world = users(naive, ScoringRule.VOCAB, count=1, noise=0.0)[0]
    trie, parents = world.trie, world.trie.children(ROOT).astype(np.int64)
    everything, rest = PrefixPrior(trie, world.rule), PrefixPrior(trie, world.rule)
    some = np.arange(0, world.catalogue.items, 2)
    pruning = world.catalogue.pruning(**{"excluded": np.empty(0, dtype=np.int64), way: some})
    for _ in range(300):
        everything.learn(dict(world.evaluate(parents, Pruning.none(), limit=100).items()), Pruning.none())
        rest.learn(dict(world.evaluate(parents, Pruning.none(), limit=100).items()), pruning)
    beams = Beams(parents, *(np.zeros(len(parents)) for _ in range(3)))
    full, partial = (one.plan(beams, {}, BeamWidths.of(10), 10_000, Pruning.none()) for one in (everything, rest))
    level = trie.depth(full.node) == 2
    live = pruning.live(full.node)
    assert partial.node.tolist() == full.node.tolist()
    assert partial.score[level & live] == pytest.approx(full.score[level & live], abs=0.02)
    assert (np.abs(partial.score - full.score)[level & ~live] > 0.02).any()


def test_beams_without_past_evaluations_prefetch_nothing() -> None:
    naive: Sequence[World] = users(naive_catalogue(), ScoringRule.VOCAB, count=1, noise=0.0)
    prefetcher = TargetPrefetcher(naive[0].trie, ScoringRule.VOCAB, latency_of(*FLAT), max_nodes=100)
    _, first = searched(naive[0], BeamWidths.of(6), Pruning.none(), prefetcher)
    _, again = searched(naive[0], BeamWidths.of(6), Pruning.none(), prefetcher)
    assert (len(first), len(again) < 4) == (4, True)


def test_disabled_prefetcher_still_learns() -> None:
    world = users(naive_catalogue(), ScoringRule.VOCAB, count=1, noise=0.0)[0]
    prefetcher = TargetPrefetcher(world.trie, ScoringRule.VOCAB, latency_of(*FLAT), max_nodes=100)
    made = [
        searched(world, BeamWidths.of(6), Pruning.none(), prefetcher, enabled=enabled)[1]
        for enabled in (False, False, True)
    ]
    assert [len(made[0]), len(made[1]), len(made[2]) < 4] == [4, 4, True]


def test_co_batched_requests_prefetch_less() -> None:
    """All of them wait for the nodes that are prefetched for one."""
    widths, tokens = BeamWidths.of(6), []
    for occupancy in (1, 4):
        worlds = users(naive_catalogue(), ScoringRule.VOCAB, count=100, noise=0.1)
        latency = latency_of(10.0, 0.5, occupancy=occupancy)
        prefetcher = TargetPrefetcher(worlds[0].trie, ScoringRule.VOCAB, latency, max_nodes=100)
        made = [searched(world, widths, Pruning.none(), prefetcher)[1] for world in worlds]
        tokens.append(float(np.mean([sum(len(nodes) for nodes in passes) for passes in made[60:]])))
        plain = sum(len(nodes) for nodes in searched(worlds[0], widths, Pruning.none(), None)[1])
    assert tokens[1] <= plain + 1 < tokens[0]
