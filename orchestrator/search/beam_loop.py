"""Speculative beam decoding: beam search over a memo (method, section 4).

The target evaluates the nodes that the search needs. With a plan, one pass also evaluates nodes of deeper levels. A level whose
beams are all in the memo is accepted: it needs no pass of its own. With empty plans this is plain beam search. So the reference,
the fallback without a draft and the speculative search are one function, and the strict list is exact by construction.

The target's autonomous search makes the same decisions in advance, by the same rules (`atspeed.engine.search.search_rules`). It
only prefetches passes: this loop chooses every beam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from atspeed.engine.arrays import Int64
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Evaluation, ScoringRule
from atspeed.engine.search.trie import Trie
from atspeed.observability import tracing
from orchestrator.search.memo import Memo
from orchestrator.search.policies import Policy


class Draft(Protocol):
    """Draft that proposes the nodes that the search will need. After a failure its plans are empty.

    Only the request's deadline is an error.
    """

    async def plan(self, below: Beams) -> Plan:
        """Return nodes below these beams that are worth evaluating in the same pass."""


class Target(Protocol):
    """Target that evaluates nodes for one request."""

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Make one pass over int64 `nodes` [n]: ascending inner nodes whose parents are evaluated or among them."""


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        leaves: the list as trie leaves, best first.
        memo: all nodes that the target evaluated.
    """

    leaves: Beams
    memo: Memo


async def beam_search(trie: Trie, rule: ScoringRule, policy: Policy, target: Target, draft: Draft) -> SearchResult:
    """Search the trie from the root to its leaves, with one target pass for each level that is not accepted."""
    memo = Memo(trie, rule)
    beams = Beams.root()
    for level in range(trie.levels):
        missing = policy.missing(beams, memo)
        if len(missing):
            below = policy.to_plan(beams, missing)
            plan = await draft.plan(below) if level < trie.levels - 1 else Plan.empty(below)
            memo.add(await target.evaluate(memo.wanted(beams.take(missing), plan)))
        with tracing.span("select", level=level):
            beams = policy.select(memo.use(beams), memo)
    return SearchResult(policy.final(beams), memo)
