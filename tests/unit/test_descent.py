"""A search that the target goes on with by itself makes the passes that the loop asks for where nothing is drafted."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.descent import Descent
from engine.scoring import Perturbation, ScoringRule
from engine.trie import ROOT, Pruning
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.verification import ExactSampling, Policy, Strict
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import ScriptedDraft, TableTarget, World, naive_tries, nothing


def asked_by_the_loop(target: TableTarget, policy: Policy) -> list[list[int]]:
    world = target.world
    asyncio.run(beam_search(world.trie, world.rule, policy, target, ScriptedDraft(world.trie, nothing)))
    return target.asked


def made_alone(target: TableTarget, policy: Policy) -> list[list[int]]:
    world = target.world
    descent = Descent(world.trie, world.rule, policy.beam_width, target.noise)
    while len(nodes := descent.next_nodes()):
        descent.add(asyncio.run(target.evaluate(nodes)))
    return target.asked


@given(naive_tries(), st.sampled_from(ScoringRule), st.integers(1, 6), st.integers(0, 2**32), st.data())
def test_its_passes_are_the_loops(
    naive: NaiveTrie, rule: ScoringRule, width: int, seed: int, data: st.DataObject
) -> None:
    """Coarse logits make ties; under rule `trie` some nodes need no pass, and some beams cannot matter."""
    items = sorted(naive.items)
    excluded = data.draw(st.lists(st.sampled_from(items), max_size=len(items) - 1, unique=True))
    world = World.random(naive, rule, seed, coarse=data.draw(st.booleans()))
    for policy in (Strict(width), ExactSampling(width, Perturbation(seed, 0.7))):
        noise = policy.noise if policy.perturbed else None
        one, other = (TableTarget(world, world.pruning(excluded), width, noise) for _ in range(2))
        assert made_alone(one, policy) == asked_by_the_loop(other, policy)


def test_below_a_root_without_children_there_is_nothing_to_do() -> None:
    naive = NaiveTrie({"a": (0, 0), "b": (1, 1)}, (2, 2))
    world = World.random(naive, ScoringRule.VOCAB, seed=1)
    target = TableTarget(world, Pruning(world.trie.children(ROOT).astype(np.int32)), 2)
    descent = Descent(world.trie, world.rule, 2)
    assert descent.next_nodes().tolist() == [ROOT]
    descent.add(asyncio.run(target.evaluate(np.array([ROOT]))))
    assert descent.next_nodes().tolist() == []
