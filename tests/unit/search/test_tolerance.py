"""A planned node may replace a better one within the tolerance, and the reply has the largest gap."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import (
    Beams,
)
from atspeed.engine.search.scoring import ScoringRule
from orchestrator.search.memo import Memo
from orchestrator.search.policies import Strict, Tolerance
from tests.oracles.naive_search import (
    naive_beam_search,
)
from tests.oracles.naive_trie import NaiveTrie, Path
from tests.oracles.policies import NAIVE, search
from tests.oracles.worlds import ScriptedDraft, World, at_random, beam_widths, naive_tries, run_now


@dataclass(frozen=True)
class Recorded(Tolerance):
    """A tolerance policy that notes, for every level, the beams given, what was known by then, and the choice."""

    levels: list[tuple[Beams, set[int], Beams]] = field(default_factory=list)

    def select(self, beams: Beams, memo: Memo) -> Beams:
        known = {node for node in range(memo.trie.nodes) if len(memo.trie.children(node)) and memo.knows(node)}
        chosen = super().select(beams, memo)
        self.levels.append((beams, known, chosen))
        return chosen


@given(
    naive=naive_tries(max_items=25),
    rule=st.sampled_from(ScoringRule),
    seed=st.integers(0, 2**32),
    widths=beam_widths,
    tolerance=st.sampled_from([0.0, 0.2, 1.0, 3.0, 100.0]),
    density=st.sampled_from([0.3, 0.6, 0.9]),
)
def test_the_tolerance_bounds_every_replacement(
    naive: NaiveTrie, rule: ScoringRule, seed: int, widths: BeamWidths, tolerance: float, density: float
) -> None:
    """Level by level: only unforeseen nodes make way, for foreseen ones, by at most the tolerance; the largest is told.

    Gaps are counted as the rule pairs them: the worst of the replaced with the best that stands in, and so on upwards.
    """
    world = World.random(naive, rule, seed)
    policy = Recorded(widths, tolerance)
    result = run_now(search(world, policy, ScriptedDraft(world.trie, at_random(seed, density))))
    gaps: list[float] = []
    for level, (beams, known, chosen) in enumerate(policy.levels, start=1):
        strict = _strict_choice(world, beams, widths.at(level))
        scores = dict(zip(chosen.node.tolist(), chosen.score.tolist(), strict=True))
        replaced = sorted((score, node) for node, score in strict.items() if node not in scores)
        standing_in = sorted(((score, node) for node, score in scores.items() if node not in strict), reverse=True)
        assert len(chosen) == len(strict)
        assert not known & {node for _, node in replaced}
        assert {node for _, node in standing_in} <= known
        gaps += [worse[0] - better[0] for worse, better in zip(replaced, standing_in, strict=True)]
    assert all(0 <= gap <= tolerance for gap in gaps)
    assert result.memo.substitutions == len(gaps)
    assert result.memo.largest_slack == max(gaps, default=0.0)
    if not gaps:
        assert world.paths(result.leaves.node) == _strict_list(world, widths)


def _strict_choice(world: World, beams: Beams, width: int) -> dict[int, float]:
    candidates = [
        (-(score + world.model(path, code)), world.naive.id_of[*path, code])
        for path, score in zip(world.paths(beams.node), beams.score.tolist(), strict=True)
        for code in world.naive.children(path)
    ]
    return {node: -negative for negative, node in sorted(candidates)[:width]}


def _strict_list(world: World, widths: BeamWidths) -> list[Path]:
    return [path for path, _ in naive_beam_search(world.naive, world.model, widths.listed, lambda _: True)[-1]]


@given(naive_tries(), st.integers(0, 2**32), beam_widths)
def test_tolerance_zero_is_strict(naive: NaiveTrie, seed: int, widths: BeamWidths) -> None:
    """List, scores, passes and counters, under the same plans, ties included."""
    world = World.random(naive, ScoringRule.VOCAB, seed, coarse=True)
    results = [
        run_now(search(world, policy, ScriptedDraft(world.trie, at_random(seed, 0.5))))
        for policy in (Strict(widths), Tolerance(widths, 0.0))
    ]
    strict, tolerant = results
    assert strict.leaves.node.tolist() == tolerant.leaves.node.tolist()
    assert strict.leaves.score.tolist() == tolerant.leaves.score.tolist()
    assert strict.memo.passes == tolerant.memo.passes
    assert (tolerant.memo.substitutions, tolerant.memo.largest_slack) == (0, 0.0)


def test_a_large_tolerance_saves_passes() -> None:
    """A plan with enough nodes of every level needs one pass when any of them may stand in."""
    world = World.random(NAIVE, ScoringRule.VOCAB, seed=5)
    strict = naive_beam_search(NAIVE, world.model, [1], lambda _: True)
    best = NAIVE.id_of[strict[1][0][0]]
    draft = ScriptedDraft(world.trie, lambda inner: inner != best)
    result = run_now(search(world, Tolerance(BeamWidths.of(1), 100.0), draft))
    assert result.memo.passes == 1
    assert result.memo.substitutions == 1
    assert run_now(search(world, Strict(BeamWidths.of(1)), draft)).memo.passes > 1
