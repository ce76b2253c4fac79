"""Planning by what is expected to cost least: from no plan at all to all that the draft can think of (method, section 7)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.beams import Beams, Float64
from engine.cost import PassCost
from engine.plan import Plan, PlanSize
from engine.trie import Int64, Trie
from orchestrator.planning.call_costs import CallCosts, ModelCosts, Pass
from orchestrator.planning.coverage import NOTHING, Coverage, Cuts, Kind, Requirement
from orchestrator.planning.decayed import Decayed
from orchestrator.planning.request_planning import PlanRecord, RequestPlanning, Task, found_cached
from orchestrator.search.memo import Memo
from orchestrator.usage import Usage

_ROOM = 1.5
"""Nodes asked for, over those that would do on average: requests differ, and what lies deeper is learnt from."""
_OBSERVATIONS = 16
"""Plans of a kind until they are decided by what was learnt from them."""
_WORTH = 0.97
"""A plan is asked for if all is expected to take so much of the time of the target alone: less is within what guesses are off."""
_LONGEST_LULL = 32
"""Requests in a row that are not weighed."""
_OLDEST = 5.0
"""Requests that one observation stands for at most: what is rarely asked is learnt from the latest 20 at least."""
_LEAST_PATIENCE_NS = 100e6
"""For a plan, whatever the target alone would take: between two processes of a machine that is busy a moment is lost soon."""


@dataclass
class Lull:
    """Requests that are not weighed, because none of those before them was worth a plan: 1, then 2, 4 ... between two that are.

    learnt: plans that had been learnt from when one was last weighed: after another one the next is weighed. passes, alone_ns:
    what was then expected of the target alone.
    """

    length: int = 0
    left: int = 0
    learnt: int = 0
    passes: float = 0.0
    alone_ns: float = 0.0

    def covers(self, learnt: int) -> bool:
        """Whether one more request need not be weighed."""
        if self.left <= 0 or learnt != self.learnt:
            return False
        self.left -= 1
        return True

    def goes_on(self, learnt: int, passes: float, alone_ns: float) -> None:
        """One was weighed, and no plan would pay."""
        self.length = self.left = min(_LONGEST_LULL, max(1, 2 * self.length))
        self.learnt, self.passes, self.alone_ns = learnt, passes, alone_ns

    def ends(self) -> None:
        """One was weighed, and a plan is expected to pay."""
        self.length = self.left = 0


class Experience:
    """What earlier requests say about the next.

    further: by kind and level, what searches went on to cost from a first missing beam there, over what they cost without a
    draft from there on. explored_share: of the time of requests that no plan would speed up, what may be spent on plans all
    the same, so that this experience stays true. patience: how often the time of the target alone a plan may take.
    """

    def __init__(self, costs: ModelCosts, levels: int, max_nodes: int, explored_share: float, patience: float) -> None:
        self.costs, self.coverage, self.patience = costs, Coverage(levels, max_nodes), patience
        self.further: dict[tuple[Kind, int], Decayed] = defaultdict(lambda: Decayed(1.0))
        self._lulls: dict[tuple[Kind, int, int, int], Lull] = defaultdict(Lull)
        self._since: Counter[tuple[Kind, int]] = Counter()
        self._explored_share, self._saved_ns, self._asked_ns = (
            explored_share / max(1, levels - 1),
            np.zeros(levels),
            np.ones(levels),
        )

    def lull(self, kind: Kind, start: int, beams: int, prompt_tokens: int) -> Lull:
        """That of requests like this one, which is counted."""
        self._since[kind, start] += 1
        return self._lulls[kind, start, beams.bit_length(), prompt_tokens.bit_length()]

    def learn(self, kind: Kind, start: int, requirements: Sequence[Requirement]) -> None:
        """What each level below a plan's beams turned out to require; of the requests before it that had no plan nobody knows."""
        self.coverage.learn(kind, start, requirements, min(_OLDEST, self._since.pop((kind, start), 1)))

    def save(self, start: int, alone_ns: float) -> None:
        """Save up of a search that goes on for so long alone."""
        self._saved_ns[start] += self._explored_share * alone_ns

    def has_saved(self, start: int) -> bool:
        """Whether it is enough to draft for the experience, by what that was last expected to take."""
        return bool(self._saved_ns[start] >= self._asked_ns[start])

    def explores(self, start: int, draft_ns: float) -> bool:
        """Whether so much was saved up, which then is spent."""
        self._asked_ns[start] = draft_ns
        if not self.has_saved(start):
            return False
        self._saved_ns[start] -= draft_ns
        return True


@dataclass(frozen=True)
class Outlook:
    """What the target still has to do from a plan on, in nanoseconds, by how much is planned. `l`: the levels below the beams.

    prompt, beams, cached: tokens of the next pass without the plan: of the prompt and of the beams, and those that it finds.
    plain: float64 [l], from each level on without a draft, all its beams missing. further: float64 [l], the share of it that
    the search takes with one.
    """

    target: CallCosts
    prompt: float
    beams: int
    cached: float
    plain: Float64
    further: Float64

    def first(self, nodes: Int64) -> Float64:
        """The next pass, with so many planned nodes [c]."""
        evaluated = self.beams + nodes
        return self.target.call(self.prompt + evaluated, self.cached, evaluated, opens=self.prompt > 0)

    def expected(self, nodes: Int64, missed: Float64) -> Float64:
        """All of it [c], for plans of so many nodes [c] that miss each level, or one above it, with probabilities [l, c]."""
        plain = self.plain * self.further
        further = (plain - np.append(plain[1:], 0.0)) @ missed  # of what is missed first, summed by parts
        if self.prompt:  # without a plan for the root, level 1 is missing as a whole
            further = np.where(nodes == 0, self.plain[0], further)
        return np.asarray(self.first(nodes) + further)

    def passes(self, nodes: int, missed: Float64) -> float:
        """Passes, the next included, after a plan of so many nodes that misses the levels with probabilities [l]."""
        left = np.arange(len(self.plain), 0, -1)
        if self.prompt and not nodes:
            return 1.0 + float(left[0])
        return 1.0 + float((left * self.further) @ np.diff(missed, prepend=0.0))


class AdaptivePlanning(RequestPlanning):
    """The planning of one request whose plans are of the size, and are cut to the part, that is expected to cost least.

    nodes: of a plan while there is no experience with such.
    """

    def __init__(self, trie: Trie, task: Task, nodes: int, max_nodes: int, kind: Kind, experience: Experience) -> None:
        super().__init__(trie, task, nodes, experience.costs)
        self._experience, self._kind, self._max_nodes = experience, kind, max_nodes

    def size(self, below: Beams) -> PlanSize | None:
        """The size at which draft and target together are expected to be done first; None if that is without a plan."""
        start, beams, experience = self._level(below), len(below), self._experience
        self._known.update(below.node.tolist())
        lull = experience.lull(self._kind, start, beams, self._task.prompt_tokens)
        learnt = experience.coverage.observations(self._kind, start)
        if not lull.covers(learnt) or experience.has_saved(start):
            return self._weighed(start, beams, lull, learnt)
        experience.save(start, lull.alone_ns)
        self._note(start, lull.passes, lull.alone_ns)
        return None

    def _weighed(self, start: int, beams: int, lull: Lull, learnt: int) -> PlanSize | None:
        """The same, by what every size is expected to cost."""
        experience = self._experience
        outlook, nothing = self._outlook(start, beams, None), self._missed(start, np.array([NOTHING]))
        alone = float(outlook.expected(np.array([0]), nothing)[0])
        self.patience_seconds = max(_LEAST_PATIENCE_NS, experience.patience * alone) / 1e9
        if self._target_is_full():
            self._note(start, outlook.passes(0, nothing[:, 0]), alone)
            return None
        asked, target = self._candidates(outlook, start, beams)
        total = self._draft_ns(experience.costs, start, beams, asked) + target
        best = int(np.argmin(total))
        if total[best] < _WORTH * alone:
            lull.ends()
            return self._sized(int(asked[best]))
        lull.goes_on(learnt, outlook.passes(0, nothing[:, 0]), alone)
        experience.save(start, alone)
        telling = self._telling(start, beams)
        if experience.explores(start, float(self._draft_ns(experience.costs, start, beams, telling))):
            return self._sized(int(telling))
        self._note(start, lull.passes, alone)
        return None

    def _target_is_full(self) -> bool:
        """Whether what counts is the target's work, of which a plan is more, and not how long this request takes.

        Then nothing is drafted, not even for the experience.
        """
        width = self._task.beam_width
        return self._experience.costs.target.full(Pass(width, self._task.prompt_tokens, width))

    def learn(self, memo: Memo, target: Usage, draft: Usage) -> None:
        """Learn what was required, what misses led to, and what calls cost."""
        if self._records:
            used = self._used(memo)
            for record in self._records:
                self._experience.learn(self._kind, record.start, self._required(record, used))
            if target.clean:
                self._learn_further(memo, target)
        super().learn(memo, target, draft)

    def _keep(self, below: Beams, asked: PlanSize, plan: Plan, cost: PassCost) -> Plan:
        start, complete = self._level(below), len(plan.node) < asked.max_nodes
        cuts = Cuts.of(plan, complete=complete)
        missed, nodes = self._missed(start, cuts.depth), np.arange(len(plan.node) + 1)
        outlook = self._outlook(start, len(below), found_cached(cost) if start == 0 else None)
        expected = outlook.expected(nodes, missed)
        best = int(np.argmin(expected))
        self._note(start, outlook.passes(best, missed[:, best]), float(expected[best]))
        self._experience.coverage.note(self._kind, start, missed, complete=complete)
        return plan.take(np.sort(cuts.order[:best]))

    def _note(self, start: int, passes: float, nanoseconds: float) -> None:
        if start == 0:
            self.report.expected_passes, self.report.expected_ns = passes, nanoseconds

    def _missed(self, start: int, depth: Float64) -> Float64:
        return self._experience.coverage.missed(self._kind, start, depth)

    def _candidates(self, outlook: Outlook, start: int, beams: int) -> tuple[Int64, Float64]:
        """Sizes to ask for [s], and what the target is then expected to take [s]."""
        most, coverage = self._most(start, beams), self._experience.coverage
        if coverage.observations(self._kind, start) < _OBSERVATIONS:
            # As if the draft were right, so that it gets its chance wherever it could pay at all.
            beams_below = np.array([self._task.beam_width * len(outlook.plain)])
            asked = self._telling(start, beams)[None]
            return asked, outlook.expected(np.minimum(beams_below, asked), np.zeros((len(outlook.plain), 1)))
        nodes, missed = coverage.profile(self._kind, start)
        asked = np.minimum(np.ceil(_ROOM * nodes), most).astype(np.int64)
        return asked, outlook.expected(np.minimum(nodes, most), missed)

    def _telling(self, start: int, beams: int) -> Int64:
        """A size to learn from: of those that cost the draft at most twice as much as a plan of the usual size, the largest."""
        most = self._most(start, beams)
        sizes = np.minimum(np.geomspace(self._nodes, max(self._nodes, most), 8).astype(np.int64), most)
        times = self._draft_ns(self._experience.costs, start, beams, sizes)
        return np.asarray(sizes[np.flatnonzero(times <= 2.0 * times[0])[-1]])

    def _most(self, start: int, beams: int) -> int:
        """Most nodes of a plan. A further one has its beams' and its levels' share of the first."""
        if start == 0:
            return self._max_nodes
        share = beams / self._task.beam_width * (self._trie.levels - 1 - start) / (self._trie.levels - 1)
        return max(1, min(self._max_nodes - 1, round(self._max_nodes * share)))

    def _outlook(self, start: int, beams: int, draft_cached: bool | None) -> Outlook:
        """draft_cached: whether the draft had some of the prompt cached, once it has answered."""
        costs, prompt = self._experience.costs, self._task.prompt_tokens
        computed = max(1.0, costs.share[draft_cached].value * prompt) if start == 0 else 0.0
        cached = prompt - computed if start == 0 else prompt + len(self._known)
        levels = range(start + 1, self._trie.levels)
        sizes = np.diff(self._trie.level_start)[levels.start : levels.stop]
        width = np.minimum(sizes, self._task.beam_width)
        passes = costs.target.call(width, prompt, width)
        further = np.array([self._experience.further[self._kind, level].value for level in levels])
        return Outlook(costs.target, computed, beams if start else 0, cached, np.cumsum(passes[::-1])[::-1], further)

    def _used(self, memo: Memo) -> list[Int64]:
        """By level, the beams of the search that had to be evaluated."""
        used = np.sort(np.fromiter(memo.used, dtype=np.int64, count=len(memo.used)))
        used = used[~memo.certain(used)]
        return np.split(used, np.searchsorted(used, self._trie.level_start[1 : self._trie.levels]))

    def _required(self, record: PlanRecord, used: Sequence[Int64]) -> list[Requirement]:
        """What each level below a plan's beams would have required of it."""
        cuts = Cuts.of(record.plan, complete=len(record.plan.node) < record.asked)
        below = used[record.start + 1 :]
        if record.start:  # what was planned before counts as known
            known = np.fromiter(record.known, dtype=np.int64, count=len(record.known))
            below = [level[~np.isin(level, known)] for level in below]
        return [cuts.required(record.plan, level) for level in below]

    def _learn_further(self, memo: Memo, target: Usage) -> None:
        """From each pass after a plan that promised to make it needless: what it and all after it cost."""
        if not self._records[0].kept or len(memo.pass_levels) != len(target.costs):
            return
        costs, to_come = self._experience.costs, 0.0
        passes = self._target_passes(target.costs)
        drafts = {record.start: record for record in self._records}
        for level, one in reversed(list(zip(memo.pass_levels[1:], passes[1:], strict=True))):
            to_come += float(costs.target.call(one.new, one.cached, one.nodes))
            if level in drafts:
                to_come += float(self._draft_ns(costs, level, drafts[level].beams, np.array(drafts[level].asked)))
            plain = self._outlook(level - 1, 1, None).plain[0]
            self._experience.further[self._kind, level].add(to_come / plain)
