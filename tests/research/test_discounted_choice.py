"""Choice by discounted means, on options whose costs are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from research.planner_ablation.discounted_choice import DiscountedChoice

SHARE = 0.01
TRIALS = 3


def play(
    choice: DiscountedChoice,
    costs: Sequence[float],
    rounds: int,
    *,
    spread: float = 0.15,
    seed: int = 1,
    extra: Callable[[np.random.Generator], tuple[float, float]] = lambda _: (0.0, 0.0),
) -> list[int]:
    """Return the choices of so many rounds. extra: a covariate and what it adds to the cost."""
    rng, chosen = np.random.default_rng(seed), []
    for _ in range(rounds):
        number = choice.choose()
        covariate, added = extra(rng)
        choice.learn(number, costs[number] * (1 + spread * float(rng.normal())) + added, covariate)
        chosen.append(number)
    return chosen


def loss(chosen: Sequence[int], costs: Sequence[float]) -> float:
    """Return the mean cost beyond the best option, as a share of it."""
    return float(np.mean([costs[number] for number in chosen])) / min(costs) - 1


def test_every_option_is_tried_first() -> None:
    choice = DiscountedChoice(4, SHARE)
    assert choice.mean(0) is None
    chosen = play(choice, [10.0, 20.0, 30.0, 40.0], 4 * TRIALS)
    assert [chosen.count(number) for number in range(4)] == [TRIALS] * 4
    assert chosen[:4] == [0, 1, 2, 3]


@pytest.mark.parametrize("best", range(4))
def test_choice_converges_to_the_best_option(best: int) -> None:
    costs = [50.0 if number == best else 60.0 + 5 * number for number in range(4)]
    losses = []
    for seed in range(10):
        choice = DiscountedChoice(4, SHARE)
        play(choice, costs, 60, seed=seed)
        losses.append(loss(play(choice, costs, 400, seed=seed + 100), costs))
    assert np.mean(losses) < 0.02


def test_exploration_costs_at_most_its_share() -> None:
    """Costs are exact, so that whatever is lost is exploration: of near options and of very expensive ones."""
    costs = [10.0, 10.4, 14.0, 40.0, 500.0]
    for share in (0.01, 0.05):
        choice = DiscountedChoice(len(costs), share)
        play(choice, costs, TRIALS * len(costs), spread=0.0)
        chosen = play(choice, costs, 20_000, spread=0.0)
        assert 0.2 * share < loss(chosen, costs) <= share
        assert chosen.count(1) > chosen.count(2) > chosen.count(3) > chosen.count(4) > 0


def test_nothing_is_explored_without_a_share() -> None:
    choice = DiscountedChoice(3, 0.0)
    play(choice, [10.0, 11.0, 12.0], 3 * TRIALS, spread=0.0)
    assert set(play(choice, [10.0, 11.0, 12.0], 1000, spread=0.0)) == {0}


def test_choice_follows_a_change() -> None:
    """The best option becomes the worst, and the other way round."""
    before, after = [20.0, 30.0, 40.0], [40.0, 30.0, 20.0]
    for seed in range(10):
        choice = DiscountedChoice(3, 0.05)
        play(choice, before, 300, seed=seed)
        play(choice, after, 200, seed=seed)
        assert loss(play(choice, after, 300, seed=seed + 50), after) < 0.08


def test_choice_finds_an_option_that_becomes_good() -> None:
    before, after = [20.0, 30.0], [20.0, 10.0]
    choice = DiscountedChoice(2, SHARE)
    play(choice, before, 300)
    assert np.mean(play(choice, after, 300)[-50:]) > 0.9


def test_machine_that_becomes_slower_keeps_the_choice() -> None:
    """Means of other options are from faster times. A few observations of them suffice."""
    costs = [20.0, 30.0, 40.0]
    choice = DiscountedChoice(3, SHARE)
    play(choice, costs, 300)
    slow = [3 * cost for cost in costs]
    assert loss(play(choice, slow, 100), slow) < 0.06
    assert loss(play(choice, slow, 300, seed=2), slow) < 0.02


def test_covariate_explains_noise() -> None:
    """Half of the requests have 80 tokens more to compute, which take as long as two thirds of the rest."""
    costs = [50.0, 47.0, 55.0]

    def cold(rng: np.random.Generator) -> tuple[float, float]:
        tokens = 80.0 * int(rng.integers(2))
        return tokens, 0.4 * tokens

    losses = []
    for seed in range(20):
        choice = DiscountedChoice(3, SHARE)
        play(choice, costs, 100, spread=0.03, extra=cold, seed=seed)
        losses.append(loss(play(choice, costs, 200, spread=0.03, extra=cold, seed=seed + 100), costs))
    assert np.mean(losses) < 0.015
    assert choice.mean(1) == pytest.approx(47 + 0.4 * 40, rel=0.06)


def test_pause_of_the_machine_changes_little() -> None:
    choice = DiscountedChoice(2, 0.0)
    play(choice, [20.0, 30.0], 100, spread=0.0)
    choice.learn(0, 1e6)
    assert (choice.mean(0) or 0) < 22.0
