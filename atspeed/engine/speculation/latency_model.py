"""What a model's calls cost now: its published curve, held true by what calls really take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beams import Float64
from atspeed.engine.speculation.ewma import Ewma, EwmaRegression

_TRUST = 3
"""Calls that a curve counts for: the first ones, on connections that are not open yet, do not decide alone."""
_QUEUE_MEMORY = 10
"""Calls that the mean queue remembers: load changes sooner than machines do."""
_FADING = 0.995
_MOST_QUEUE_NS = 60_000_000_000
_OUTLIER = 4.0
_OUTLIER_NS = 500_000


@dataclass(frozen=True)
class Pass:
    """The shape of a pass. new, cached: tokens computed and tokens found. nodes: trie nodes evaluated.

    opens: whether it is the first of a stream, which is let in, opened, and looks up what is cached of its prompt.
    """

    new: int
    cached: int
    nodes: int
    opens: bool = False


class LatencyModel:
    """What calls of one model cost: the passes by its curve, times how wrong that was lately, the wait for each, and the rest.

    All is latency, what the request waits for: under load one pass computes several requests' tokens, T(c * new) for c requests.
    Times are in nanoseconds. A call that took far longer than expected counts as one that took four times as long: a pause of
    the machine says little of the next call, and a lasting change shows in many.
    """

    def __init__(self, curve: CostCurve) -> None:
        self.curve = curve
        self._log_error, self._besides = Ewma(0.0, trust=_TRUST), EwmaRegression(kinds=2)
        self._together, self._queue = Ewma(1.0), Ewma(0.0, _QUEUE_MEMORY)

    @property
    def together(self) -> float:
        """How many requests share a pass."""
        return self._together.value

    @property
    def queue_ns(self) -> float:
        """How long a pass waits until it begins."""
        return self._queue.value

    def forward(self, new: npt.ArrayLike, cached: npt.ArrayLike) -> Float64:
        """Passes in which a request has so many tokens, with what others are expected to have in them; broadcast."""
        tokens = self._together.value * np.asarray(new, dtype=np.float64)
        return np.asarray(math.exp(self._log_error.value) * self.curve.predict(tokens, cached))

    def besides(self, nodes: npt.ArrayLike, *, opens: bool = False) -> Float64:
        """What a call over so many nodes takes outside its passes and their queue: choosing children, the network, messages.

        Of one that opens a stream, to be let in and the look-up of its prompt are in it.
        """
        return self._besides.at(nodes, int(opens))

    def call(self, new: npt.ArrayLike, cached: npt.ArrayLike, nodes: npt.ArrayLike, *, opens: bool = False) -> Float64:
        """All of calls of one pass each, broadcast.

        A queue counts for no more than the pass: where it is longer, what all wait for is each other's passes, and to make these
        longer in order to wait less often would only be to push in.
        """
        forward = self.forward(new, cached)
        return np.asarray(np.minimum(self.queue_ns, forward) + forward + self.besides(nodes, opens=opens))

    def full(self, plain: Pass) -> bool:
        """Whether passes wait for longer than this one takes, a request's without a plan.

        A pass that finds one running waits for about as long. Where it waits for longer there are others before it, and how
        many requests are served is up to the model's work on each. Others in the pass are left out, as planning itself changes
        how many there are.
        """
        return self.queue_ns > self.predict([plain], PassStats())

    def predict(self, passes: Sequence[Pass], cost: PassStats) -> float:
        """The time in the model of one call's passes that were made, with what other requests had in them; `observe` it later."""
        return math.exp(self._log_error.value) * self._by_curve(passes, cost)

    def observe(self, passes: Sequence[Pass], cost: PassStats, wait_ns: int) -> float:
        """One call that went well: its passes, what the service says that they took, and how long the answer took to come.

        What `predict` would have said before.
        """
        self._together.add(max(1, cost.batch_requests))
        by_curve, known, outlier = self._by_curve(passes, cost), self._log_error.value, math.log(_OUTLIER)
        error = math.log(max(1, cost.forward_ns) / by_curve)
        self._log_error.add(min(max(error, known - outlier), known + outlier))
        self._queue.add(min(cost.queue_ns, _MOST_QUEUE_NS) / len(passes))
        nodes, opens = sum(one.nodes for one in passes), passes[0].opens
        besides = max(0, wait_ns - cost.forward_ns - cost.queue_ns)
        likely = float(self.besides(nodes, opens=opens))
        self._besides.add(nodes, min(besides, _OUTLIER * likely + _OUTLIER_NS), int(opens))
        return math.exp(known) * by_curve

    def late(self, passes: int, expected_ns: float, waited_ns: float) -> None:
        """A call that was given up: it would have taken so long at least, and what is above the expected counts as queue."""
        if waited_ns > expected_ns:
            self._queue.add(self.queue_ns + min(waited_ns - expected_ns, _MOST_QUEUE_NS) / passes)

    def not_asked(self) -> None:
        """A request that did without the model: what is known of its queue fades, since nobody would notice that it is gone."""
        self._queue.value *= _FADING

    def _by_curve(self, passes: Sequence[Pass], cost: PassStats) -> float:
        """Of the passes as they were, with the other requests' tokens and padding."""
        others = max(1.0, cost.batch_tokens / max(1, cost.new_tokens))
        return sum(float(self.curve.predict(others * one.new, one.cached)) for one in passes)
