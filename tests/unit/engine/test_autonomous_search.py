"""An autonomous search makes the passes that the loop asks for without a draft."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.arrays import Int64
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.scoring import Evaluation, Perturbation, ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning
from atspeed.engine.speculation.autonomous_search import AutonomousSearch
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import ExactSampling, Policy, Strict
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import ScriptedDraft, TableTarget, World, beam_widths, naive_tries, nothing, run_now


def asked_by_the_loop(target: TableTarget, policy: Policy) -> list[list[int]]:
    world = target.world
    run_now(beam_search(world.trie, world.rule, policy, target, ScriptedDraft(world.trie, nothing)))
    return target.asked


def made_alone(target: TableTarget, policy: Policy) -> list[list[int]]:
    world = target.world
    found: list[Evaluation] = []

    def search() -> Generator[Int64, Evaluation, None]:
        search = AutonomousSearch(world.trie, world.rule, policy.beam_widths or BeamWidths.of(0), target.noise)
        found.extend((yield from search.steps(np.array([ROOT]))))

    passes = search()
    nodes: Int64 | None = next(passes)
    while nodes is not None:
        nodes = sent(passes, run_now(target.evaluate(nodes)))
    assert [evaluation.node.tolist() for evaluation in found] == target.asked
    return target.asked


def on_a_stream(world: World, asked: list[list[int]]) -> list[list[int]]:
    """Return the nodes as `TargetSession` asks for them: with certain ancestors, which were never asked for."""
    sent: list[list[int]] = []
    for nodes in asked:
        before = {node for one in sent for node in one}
        closed = {0, *world.trie.with_ancestors(nodes).tolist()}
        sent.append(sorted(closed - before))
    return sent


def sent(passes: Generator[Int64, Evaluation, None], evaluation: Evaluation) -> Int64 | None:
    """The nodes of the next pass, if there is one."""
    try:
        return passes.send(evaluation)
    except StopIteration:
        return None


@given(naive_tries(), st.sampled_from(ScoringRule), beam_widths, st.integers(0, 2**32), st.data())
def test_autonomous_search_makes_the_passes_of_the_loop(
    naive: NaiveTrie, rule: ScoringRule, widths: BeamWidths, seed: int, data: st.DataObject
) -> None:
    """Coarse logits make ties; under rule `trie` some nodes need no pass, and some beams cannot matter."""
    items = sorted(naive.items)
    excluded = data.draw(st.lists(st.sampled_from(items), max_size=len(items) - 1, unique=True))
    world = World.random(naive, rule, seed, coarse=data.draw(st.booleans()))
    for policy in (Strict(widths), ExactSampling(widths, Perturbation(seed, 0.7))):
        noise = policy.noise if policy.perturbed else None
        one, other = (TableTarget(world, world.pruning(excluded), widths.largest, noise) for _ in range(2))
        asked = asked_by_the_loop(other, policy)
        if asked[:1] == [[ROOT]]:  # else, under rule `trie`, the root has a single child and needs no pass
            assert made_alone(one, policy) == on_a_stream(world, asked)


def test_autonomous_search_of_a_root_without_children_makes_no_pass() -> None:
    naive = NaiveTrie({"a": (0, 0), "b": (1, 1)}, (2, 2))
    world = World.random(naive, ScoringRule.VOCAB, seed=1)
    target = TableTarget(world, Pruning(world.trie.children(ROOT).astype(np.int32)), 2)
    assert made_alone(target, Strict(BeamWidths.of(2))) == [[ROOT]]
