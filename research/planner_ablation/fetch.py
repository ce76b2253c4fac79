"""Reads of Redis, simulated: the mean of reads beside a line in the bytes.

The line was the product's rule before. It is fitted by least squares over decayed reads, with a prior that never fades.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from atspeed.benchmarks.intervals import half_width
from atspeed.benchmarks.results import Columns
from atspeed.engine.ewma import Ewma
from atspeed.engine.kv.fetch_policy import FetchPolicy, RecomputeNs
from atspeed.engine.model.cost_curve import CostCurve
from research.planner_ablation.costs import PRECISIONS, Costs

NAME = "fetch"
MEAN, LINE, ALWAYS = "mean of reads", "line in the bytes", "always"
_PROMPT = 80  # tokens
_BYTES = 12 * 2 * 768 * 4  # of a token, with the shape of the inflated target: layers, K and V, width, float32
# Latency in ms and ns per byte. The second is close to docs/benchmarks/prefix.md: 80 tokens take 4.9 ms.
_SERVERS = {"near": (0.3, 0.3), "recorded": (0.5, 0.8), "far": (2.0, 1.0), "slow": (5.0, 4.0)}
_HIT_SHARES = (0.9, 0.5, 0.1)
_MISSING = ((4, 80), (16, 32), (64, 80))  # tokens that memory lacks, from and to
_SEEDS, _SETTLE, _READS = 6, 50, 300
_TIME_NOISE = 0.3  # standard deviation of the logarithm of a read's time
_FOLLOWING_PASSES = 3  # of one token each: the shortest list, on which a read weighs most


class LineOfReads:
    """Rule with a latency and a time per byte, by least squares over the latest 20 reads."""

    def __init__(self, bytes_per_token: int, recompute_ns: RecomputeNs) -> None:
        self._bytes_per_token, self._recompute_ns = bytes_per_token, recompute_ns
        self._found_share = Ewma(1.0, 20, guess_weight=20)
        # Prior reads of nothing and of 1 MiB, half a millisecond and 1 ns per byte, with a tenth of a real read's weight. Sums of
        # 1, x, x^2, y and x * y, where x is bytes and y nanoseconds.
        at_prior = 5e5 + 2.0**20
        self._prior = 0.1 * np.array([2.0, 2.0**20, 2.0**40, 5e5 + at_prior, 2.0**20 * at_prior])
        self._moments = self._prior
        self._unpaid = 0

    def should_read(self, missing: int, cached: int) -> bool:
        """Decide to read the missing tokens."""
        share = self._found_share.value
        if share * self._recompute_ns(missing, cached) > self._predict(share * missing * self._bytes_per_token):
            return True
        self._unpaid += 1
        return self._unpaid % 16 == 0

    def observe(self, asked: int, found: int, ns: float) -> None:
        """Learn from a read."""
        size = found * self._bytes_per_token
        ns = min(ns, 8.0 * max(5e5, self._predict(size)))
        self._found_share.add(found / asked)
        newest = np.array([1.0, size, size**2, ns, size * ns], dtype=np.float64)
        self._moments = self._prior + 0.95 * (self._moments - self._prior) + newest

    def _predict(self, size: float) -> float:
        weight, x, xx, y, xy = self._moments.tolist()
        per_byte = max(0.0, (weight * xy - x * y) / (weight * xx - x**2))
        latency = (y - per_byte * x) / weight
        return float(size * xy / xx) if latency < 0 else float(latency + per_byte * size)


@dataclass(frozen=True)
class FetchRow:
    """Rule in a case.

    Attributes:
        hit_share: share of the reads that find all they ask for; others find nothing.
        prompt_ratio: time until the prompt is evaluated, over that of the line.
        list_ratio: time of the shortest list, over that of the line; mean over the seeds.
        list_ratio_ci95: half of its 95 % interval.
    """

    precision: str
    server: str
    hit_share: float
    missing: str
    rule: str
    prompt_ratio: float
    list_ratio: float
    list_ratio_ci95: float


COLUMNS: Columns[FetchRow] = (
    ("target", lambda row: row.precision),
    ("Redis", lambda row: row.server),
    ("hits", lambda row: f"{row.hit_share:.0%}"),
    ("missing tokens", lambda row: row.missing),
    ("rule", lambda row: row.rule),
    ("prompt", lambda row: f"{row.prompt_ratio:.3f}"),
    ("list", lambda row: f"{row.list_ratio:.3f} ± {row.list_ratio_ci95:.3f}"),
)


def run(benchmarks: Path) -> list[FetchRow]:
    """Return a row for each case and rule but the line."""
    curves = {precision: Costs.recorded(benchmarks, precision).target for precision in PRECISIONS}
    cases = product(curves, _SERVERS, _HIT_SHARES, _MISSING)
    return [row for case in cases for row in _rows(curves[case[0]], *case)]


def _rows(
    curve: CostCurve, precision: str, server: str, hit_share: float, missing: tuple[int, int]
) -> Iterator[FetchRow]:
    times = {
        rule: np.array([_times(curve, make(), server, hit_share, missing, seed) for seed in range(_SEEDS)])
        for rule, make in _rules(curve).items()
    }
    for rule in (MEAN, ALWAYS):
        prompt, whole = (times[rule] / times[LINE]).T
        yield FetchRow(
            precision,
            server,
            hit_share,
            f"{missing[0]} to {missing[1]}",
            rule,
            round(float(prompt.mean()), 4),
            round(float(whole.mean()), 4),
            round(half_width(whole.tolist()), 4),
        )


def _rules(curve: CostCurve) -> dict[str, Callable[[], FetchPolicy | LineOfReads]]:
    return {
        MEAN: lambda: FetchPolicy(curve.saved),
        LINE: lambda: LineOfReads(_BYTES, curve.saved),
        ALWAYS: FetchPolicy,
    }


def _times(
    curve: CostCurve,
    policy: FetchPolicy | LineOfReads,
    server: str,
    hit_share: float,
    missing: Sequence[int],
    seed: int,
) -> tuple[float, float]:
    """Return the mean time of a prompt and of a list, in nanoseconds."""
    latency_ms, per_byte = _SERVERS[server]
    rng, following = np.random.default_rng(seed), _FOLLOWING_PASSES * float(curve.predict(1))
    prompts = []
    for _ in range(_SETTLE + _READS):
        asked = int(rng.integers(missing[0], missing[1] + 1))
        there = asked if rng.random() < hit_share else 0
        read_ns = (latency_ms * 1e6 + per_byte * _BYTES * there) * float(np.exp(_TIME_NOISE * rng.normal()))
        cached = _PROMPT - asked
        if policy.should_read(asked, cached):
            policy.observe(asked, there, read_ns)
            prompts.append(read_ns + float(curve.predict(1 + asked - there, cached + there)))
        else:
            prompts.append(float(curve.predict(1 + asked, cached)))
    prompt = float(np.mean(prompts[_SETTLE:]))
    return prompt, prompt + following
