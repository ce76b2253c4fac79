"""THE LOOP: beam search over a memo of evaluated trie nodes (method, section 4).

The target evaluates what the search asks for. A plan makes one pass answer the questions of several levels: where it
foresaw them, the search goes on without a pass. With an empty plan this *is* target-only beam search, so the reference,
the fallback without a draft and the speculative search are one function, and the strict list is exact by construction.
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
    """Foresees what the search will ask. One that cannot answer gives an empty plan; only the request's deadline is an error."""

    async def plan(self, below: Beams) -> Plan:
        """Nodes below these beams that are worth evaluating with them."""


class Target(Protocol):
    """Answers what the search asks, for one request."""

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """One pass of the target over `nodes` [n], ascending inner nodes whose parents are evaluated or among them."""


@dataclass(frozen=True)
class SearchResult:
    """leaves: the list as trie leaves, in order. memo: everything that was evaluated on the way."""

    leaves: Beams
    memo: Memo


async def beam_search(trie: Trie, rule: ScoringRule, policy: Policy, target: Target, draft: Draft) -> SearchResult:
    """Search the trie from the root to its leaves, level by level, with one target pass per level that no plan foresaw."""
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
