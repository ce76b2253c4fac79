"""Searches under a policy over a table, and a catalogue that is small enough for laws to be enumerated."""

from __future__ import annotations

from atspeed.engine.search.trie import Pruning
from orchestrator.search.beam_loop import Draft, SearchResult, beam_search
from orchestrator.search.policies import Policy
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import TableTarget, World

NOTHING_PRUNED = Pruning.none()
# Seven paths of three codes: branches of every width, and (2, 0, 0) without a choice.
NAIVE = NaiveTrie(
    {
        "a": (0, 0, 0),
        "b": (0, 0, 1),
        "c": (0, 1, 0),
        "d": (1, 0, 0),
        "e": (1, 0, 1),
        "f": (1, 1, 1),
        "f2": (1, 1, 1),
        "g": (2, 0, 0),
    },
    (3, 2, 2),
)

# Six paths of one to three codes.
RAGGED = NaiveTrie(
    {"a": (0, -1, -1), "b": (1, 0, 0), "c": (1, 0, 1), "d": (1, 1, -1), "e": (2, 0, -1), "f": (2, 1, 0)}, (3, 2, 2)
)


async def search(world: World, policy: Policy, draft: Draft, pruning: Pruning = NOTHING_PRUNED) -> SearchResult:
    target = TableTarget(world, pruning, policy.max_children, policy.noise if policy.perturbed else None)
    return await beam_search(world.trie, world.rule, policy, target, draft)
