"""Latency of calls to a model: its cost curve, corrected by measured calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Float64
from atspeed.engine.ewma import Ewma, EwmaRegression
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats

# Calls that the curve counts for. The first calls use connections that are still opening: one that is `_OUTLIER_RATIO` times
# too slow then corrects the curve by 4^(1/4) = 1.41.
_CURVE_WEIGHT = 3
# Calls that the mean queue remembers: load changes sooner than a machine's speed.
_QUEUE_MEMORY = 10
# Decay of the queue with each request that skips the model: half of it is left after 139 requests.
_QUEUE_DECAY = 0.995
# Longest wait that is learned from, one minute: more than any call's deadline, so it only guards against absurd replies.
_MAX_QUEUE_NS = 60_000_000_000
# Largest ratio of a measured time to the expected one that is learned from. A pause of the machine says little of the next
# call, and a lasting change shows in many calls. Chosen, not measured.
_OUTLIER_RATIO = 4.0
# Overhead that is never cut off, since the expected one is 0 at first: about four times the 0.12 ms that a message takes there
# and back between two processes (docs/log.md).
_OUTLIER_FLOOR_NS = 500_000

OPENS_STREAM = 1
"""Kind of a target's call that opens a stream: it includes admission and the look-up of the prompt's KV."""


@dataclass(frozen=True)
class Pass:
    """Shape of a pass.

    Attributes:
        new: tokens computed.
        cached: tokens whose keys and values were found.
        nodes: trie nodes evaluated.
        call: kind of the call that the pass is part of, a number that the caller chooses. Each kind has a constant overhead of
            its own. Of a target, `OPENS_STREAM` or 0; of a draft, the levels of the plan.
    """

    new: int
    cached: int
    nodes: int
    call: int = 0


class LatencyModel:
    """Predicted latency of calls to one model, in nanoseconds: overhead + queue + passes.

    Passes take the time of the cost curve, times the decayed ratio of measured to predicted time. The overhead is a line in the
    number of nodes, with a constant for each kind of call. The queue is the decayed mean wait until a pass begins. If c requests
    share a pass it takes T(c * new), and each of them waits for all of it.

    Args:
        node_costs: true if the overhead is taken for one of the nodes as long as all calls have had as many. A planner that
            takes it for a constant would never ask for fewer, and never learn what they save.

    Attributes:
        curve: the cost curve; may be replaced.
        batch_occupancy: mean number of requests that share a pass.
        queue_ns: mean wait until a pass begins.
    """

    def __init__(self, curve: CostCurve, *, node_costs: bool = False) -> None:
        self.curve = curve
        self._log_error = Ewma(0.0, guess_weight=_CURVE_WEIGHT)
        self._overhead = EwmaRegression(proportional=node_costs)  # a group for each kind of call
        self._occupancy = Ewma(1.0)
        self._queue = Ewma(0.0, _QUEUE_MEMORY)

    @property
    def batch_occupancy(self) -> float:
        """Return the mean number of requests that share a pass."""
        return self._occupancy.value

    @property
    def queue_ns(self) -> float:
        """Return the mean wait until a pass begins."""
        return self._queue.value

    def forward_ns(self, new: npt.ArrayLike, cached: npt.ArrayLike) -> Float64:
        """Predict passes in which a request has so many tokens; broadcast. Co-batched requests are expected to have as many."""
        tokens = self.batch_occupancy * np.asarray(new, dtype=np.float64)
        return np.asarray(self._error_ratio * self.curve.predict(tokens, cached))

    def overhead_ns(self, nodes: npt.ArrayLike, *, call: int = 0) -> Float64:
        """Predict the time of a call of this kind outside its passes and their queue: selection, messages, network."""
        return self._overhead.predict(nodes, call)

    def call_ns(self, new: npt.ArrayLike, cached: npt.ArrayLike, nodes: npt.ArrayLike, *, call: int = 0) -> Float64:
        """Predict calls of one pass each; broadcast.

        The queue counts for at most one pass, the one that is running. A longer queue consists of other requests' passes: longer
        passes that wait less often would lengthen it for all.
        """
        forward = self.forward_ns(new, cached)
        overhead = self.overhead_ns(nodes, call=call)
        return np.asarray(np.minimum(self.queue_ns, forward) + forward + overhead)

    def is_saturated(self, plain: Pass) -> bool:
        """Return true if passes wait longer than `plain` takes, a request's pass without a plan.

        A pass that finds another one running waits for about as long. If it waits longer, others are before it, and throughput
        depends on the work of each request. Co-batched requests are left out, since planning itself changes their number.
        """
        return self.queue_ns > self.predict([plain], PassStats())

    def predict(self, passes: Sequence[Pass], stats: PassStats) -> float:
        """Predict the time in the model of one call's passes, with the co-batched tokens that `stats` reports."""
        return self._error_ratio * self._by_curve(passes, stats)

    def observe(self, passes: Sequence[Pass], stats: PassStats, wait_ns: int) -> float:
        """Learn from one successful call: its passes, the service's stats, and the caller's wait for the reply.

        Returns what `predict` would have returned before.
        """
        self._occupancy.add(max(1, stats.batch_requests))
        by_curve = self._by_curve(passes, stats)
        predicted = self._error_ratio * by_curve
        known = self._log_error.value
        limit = math.log(_OUTLIER_RATIO)
        error = math.log(max(1, stats.forward_ns) / by_curve)
        self._log_error.add(min(max(error, known - limit), known + limit))
        self._queue.add(min(stats.queue_ns, _MAX_QUEUE_NS) / len(passes))
        self._observe_overhead(passes, max(0, wait_ns - stats.forward_ns - stats.queue_ns))
        return predicted

    def observe_timeout(self, passes: int, expected_ns: float, waited_ns: float) -> None:
        """Learn from a call that was given up. Its wait beyond the expected time counts as queue."""
        if waited_ns > expected_ns:
            self._queue.add(self.queue_ns + min(waited_ns - expected_ns, _MAX_QUEUE_NS) / passes)

    def decay_queue(self) -> None:
        """Decay the queue after a request that skipped the model; otherwise a past queue would block it forever."""
        self._queue.value *= _QUEUE_DECAY

    @property
    def _error_ratio(self) -> float:
        """Return the ratio of measured to predicted time."""
        return math.exp(self._log_error.value)

    def _observe_overhead(self, passes: Sequence[Pass], overhead_ns: float) -> None:
        nodes = sum(one.nodes for one in passes)
        call = passes[0].call
        expected = self._overhead.at(nodes, call)
        self._overhead.add(nodes, min(overhead_ns, _OUTLIER_RATIO * expected + _OUTLIER_FLOOR_NS), call)

    def _by_curve(self, passes: Sequence[Pass], stats: PassStats) -> float:
        """Return the curve's time of passes with the tokens of co-batched requests and padding."""
        batch_ratio = max(1.0, stats.batch_tokens / max(1, stats.new_tokens))
        return sum(self.curve.pass_ns(batch_ratio * one.new, one.cached) for one in passes)
