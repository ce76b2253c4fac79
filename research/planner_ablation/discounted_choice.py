"""Choice among a few options by discounted mean cost: a non-stationary bandit.

Every observation fades with each later one, whichever option it was of (the discounted mean of Garivier and Moulines, 2011). The
option of the least mean is chosen. The others are explored, cheap ones often and expensive ones rarely: each saves a share of
every cost, and is chosen once its savings pay for what it is expected to cost beyond the best. So exploration costs at most
that share, whatever the options cost. In simulations of noisy costs, this rule lost half as much as an upper confidence bound or
Thompson sampling with the same memory.
"""

from __future__ import annotations

from atspeed.engine.ewma import MEMORY, Ewma

# Observations of each option before means decide. Chosen, not measured.
_TRIALS = 3
# Weight of an option's first observation: first calls also pay for connections and memory. Chosen, not measured.
_FIRST_WEIGHT = 0.25
# Largest ratio of a cost to the expected one that is learned from: a pause of the machine says little of the next request.
_OUTLIER_RATIO = 4.0
# One choice in so many is exploration at most. Without a limit, options that cost the same would be explored all the time.
_EXPLORATION_INTERVAL = 4


class _Option:
    """Observations of one option.

    Attributes:
        count: number of observations, which does not fade.
        weight: their weight.
        cost: mean cost.
        covariate: mean covariate.
        savings: budget for exploring the option.
    """

    def __init__(self) -> None:
        self.count = 0
        self.weight = 0.0
        self.cost = 0.0
        self.covariate = 0.0
        self.savings = 0.0


class DiscountedChoice:
    """Choice among options, numbered from 0.

    A covariate that the choice does not influence, such as the number of prompt tokens that are not cached, explains a part of a
    cost. All options have the same line in it, and are compared at the mean covariate.
    """

    def __init__(self, options: int, explored_share: float, memory: int = MEMORY) -> None:
        """Choose among so many options. explored_share: share of all costs that exploration may add, after the first trials."""
        self._options = [_Option() for _ in range(options)]
        self._explored_share = explored_share
        self._fade = 1.0 - 1.0 / memory
        self._covariate = Ewma(0.0, memory)
        self._variance = Ewma(0.0, memory)
        self._covariance = Ewma(0.0, memory)
        self._since_exploration = 0

    def choose(self) -> int:
        """Return the option of the least mean, or one to explore."""
        fewest = min(self._options, key=lambda option: option.count)
        if fewest.count < _TRIALS:
            return self._options.index(fewest)
        means = [self._mean(option) for option in self._options]
        best = min(range(len(means)), key=means.__getitem__)
        self._since_exploration += 1
        others = [number for number in range(len(means)) if number != best]
        for number in others:
            self._options[number].savings += self._explored_share / len(others) * means[best]
        due = [number for number in others if self._options[number].savings >= means[number] - means[best]]
        if not self._explored_share or not due or self._since_exploration < _EXPLORATION_INTERVAL:
            return best
        self._since_exploration = 0
        explored = min(due, key=lambda number: self._options[number].weight)
        self._options[explored].savings = 0.0
        return explored

    def mean(self, number: int) -> float | None:
        """Return the mean cost of an option at the mean covariate; None before its first observation."""
        option = self._options[number]
        return self._mean(option) if option.count else None

    @property
    def least_mean(self) -> float:
        """Return the mean cost of the best option; 0 before the first observation."""
        return min((self._mean(option) for option in self._options if option.count), default=0.0)

    def learn(self, number: int, cost: float, covariate: float = 0.0) -> None:
        """Learn what an option cost."""
        for one in self._options:
            one.weight *= self._fade
        option = self._options[number]
        if option.count >= _TRIALS:
            cost = min(cost, _OUTLIER_RATIO * (option.cost + self._slope * (covariate - option.covariate)))
        if option.count:
            self._variance.add((covariate - option.covariate) ** 2)
            self._covariance.add((covariate - option.covariate) * (cost - option.cost))
        self._covariate.add(covariate)
        weight = 1.0 if option.count else _FIRST_WEIGHT
        option.count += 1
        option.weight += weight
        option.cost += (cost - option.cost) * weight / option.weight
        option.covariate += (covariate - option.covariate) * weight / option.weight

    @property
    def _slope(self) -> float:
        """Return the cost of one unit of the covariate: least squares over deviations within the options; never negative."""
        return max(0.0, self._covariance.value) / self._variance.value if self._variance.value else 0.0

    def _mean(self, option: _Option) -> float:
        return option.cost + self._slope * (self._covariate.value - option.covariate)
