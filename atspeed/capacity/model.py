"""Capacity model: replicas, memory and Redis for a rate and a p99.

All times are milliseconds, all rates are lists per second. `docs/capacity.md` has worked examples and the errors.

    way          One way of making lists: plain beam search, or speculation with a plan of some size. A shared pass serves b
                 lists. M(b) is the time of the target's model for b lists made together. One list keeps it busy for M(b) / b.
    station      One kind of service with n replicas. A user's lists go to one replica, so each replica is a queue of its own.
    busy time    s, the time that one list keeps a replica busy. A target's replica is as slow as the slower of two parts that
                 overlap, the model and the event loop:  s = max(M(b) / b, passes * pass_ms).
    utilisation  u = rate * s / (1000 * n). It stays at or below `most_utilisation`.
    wait, p99    M/G/1 with an exponential tail. A share u of the lists waits, in the mean x (1 + v) / (2 (1 - u)). Here x is the
                 time of a job, M(b), and v the squared coefficient of variation of x. Therefore
                 W99 = x (1 + v) / (2 (1 - u)) * ln(100 u),  and 0 where 100 u <= 1.
                 A list visits draft and orchestrator several times, with a part of its work each: one visit waits its p99, and
                 every other one the mean, u x (1 + v) / (2 (1 - u)).
    latency      L = M(b) + draft + added, of a list that does not wait. The p99 asked for leaves p99 - L for waiting. It is
                 divided between the stations by fixed shares. Each station gets the fewest replicas whose W99 is within its
                 share. Independent waits of these p99s rarely come together, so the division is on the safe side.
    the way      The one that needs the fewest target replicas, with its best b; the lower latency decides between equals.

A host that holds everything:  rate = min(n * 1000 / s, 1000 * cores / (threads * M(b) / b + CPU time of the services)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from atspeed.capacity.errors import CapacityError
from atspeed.capacity.sizes import (
    REDIS_BYTES_PER_SECOND,
    REDIS_CALLS_PER_SECOND,
    RedisSize,
    Sizes,
    model_gib,
    orchestrator_gib,
    redis_size,
)


@dataclass(frozen=True)
class Way:
    """One way of making lists, and its cost in the models.

    Attributes:
        name: the mode, and the plan size where there is one.
        passes: target passes of a list.
        together_ms: time of the target's model for b lists that share all passes, by b; each above 0.
        draft_ms: time of the draft's replica for all plans of a list; 0 without a draft.
    """

    name: str
    passes: float
    together_ms: Mapping[int, float]
    draft_ms: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Costs of the services beside the models, and the rules of a plan.

    Attributes:
        orchestrator_ms: CPU time of the orchestrator's event loop per list.
        pass_ms: time of the target's event loop per pass of a list.
        added_ms: latency that the services add to the models' time of a list that does not wait.
        threads: CPU threads of a target's replica.
        variation: squared coefficient of variation of a job's time.
        most_utilisation: above 0 and below 1.
        least_orchestrators: replicas that are there at any rate.
    """

    orchestrator_ms: float = 5.5
    pass_ms: float = 1.4
    added_ms: float = 10.0
    threads: int = 1
    variation: float = 0.05
    most_utilisation: float = 0.75
    least_orchestrators: int = 2


@dataclass(frozen=True)
class Station:
    """The replicas of one service.

    Attributes:
        cores: CPU cores of a replica.
        memory_gib: memory limit of a replica, in GiB.
        busy_ms: time that one list keeps a replica busy.
    """

    service: str
    replicas: int
    cores: float
    memory_gib: float
    busy_ms: float
    utilisation: float
    wait_p99_ms: float


@dataclass(frozen=True)
class CapacityPlan:
    """The deployment for a rate and a p99.

    Attributes:
        way: name of the way of making lists.
        lists_together: lists that share a target's passes, at the rate.
        latency_ms: time of a list that does not wait.
        p99_ms: predicted p99, an upper bound by the model.
        limits: statements on what limits the plan, the first one most.
    """

    way: str
    passes: float
    lists_together: int
    latency_ms: float
    p99_ms: float
    stations: Sequence[Station]
    redis: RedisSize | None
    limits: Sequence[str] = field(default_factory=tuple)


# Shares of the time left for waiting, by service.
WAIT_SHARES = {"target": 0.5, "orchestrator": 0.25, "draft": 0.25}


def wait_p99(utilisation: float, job_ms: float, variation: float, visits: float = 1.0) -> float:
    """Return the p99 of the wait at one replica, in ms; infinite from a utilisation of 1 on.

    visits: jobs of a list, at least 1. One of them waits its p99, the others wait the mean.
    """
    if utilisation >= 1:
        return math.inf
    waiting = job_ms * (1 + variation) / (2 * (1 - utilisation))
    return waiting * (max(0.0, math.log(100 * utilisation)) + (visits - 1) * utilisation) if utilisation else 0.0


def replicas_needed(
    rate: float, busy_ms: float, wait_ms: float, costs: Costs, job_ms: float, visits: float = 1.0
) -> int:
    """Return the fewest replicas that keep to the utilisation and to a p99 of the wait of `wait_ms`, above 0 ms.

    busy_ms: time that a list keeps a replica busy. job_ms, visits: as in `wait_p99`. More replicas never wait longer, so that the
    search may halve its range.
    """
    load = rate * busy_ms / 1e3

    def enough(replicas: int) -> bool:
        used = load / replicas
        return used <= costs.most_utilisation and wait_p99(used, job_ms, costs.variation, visits) <= wait_ms

    low, high = 1, 1
    while not enough(high):
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def make_plan(rate: float, p99_ms: float, ways: Sequence[Way], costs: Costs, sizes: Sizes) -> CapacityPlan:
    """Return the deployment for `rate` lists per second with 99 % of them within `p99_ms`.

    Raises CapacityError when no way makes a list in this time even without waiting.
    """
    choices = [(way, together) for way in ways for together in way.together_ms]
    possible = [(way, b) for way, b in choices if _latency(way, b, costs) < p99_ms]
    if not possible:
        least = min(_latency(way, b, costs) for way, b in choices)
        raise CapacityError(f"p99: {p99_ms:g} ms is below {least:.1f} ms, the time of a list that does not wait")

    def targets(way: Way, together: int) -> int:
        wait = _waits(p99_ms, way, together, costs)["target"]
        return replicas_needed(rate, _busy(way, together, costs), wait, costs, way.together_ms[together])

    way, together = min(possible, key=lambda each: (targets(*each), _latency(each[0], each[1], costs)))
    waits = _waits(p99_ms, way, together, costs)
    count = targets(way, together)
    stations = [_target(rate, way, together, count, costs, sizes)]
    if way.draft_ms:
        stations.append(_draft(rate, way, waits["draft"], costs, sizes))
    stations.append(_orchestrator(rate, way, waits["orchestrator"], costs, sizes))
    redis = redis_size(rate, count, sizes) if sizes.users else None
    latency = _latency(way, together, costs)
    p99 = latency + sum(station.wait_p99_ms for station in stations)
    limits = _limits(rate, way, together, stations, redis, costs, p99_ms)
    return CapacityPlan(way.name, way.passes, together, latency, p99, stations, redis, limits)


def host_saturation(replicas: int, model_ms: float, passes: float, costs: Costs, cores: int) -> float:
    """Return the lists per second of one host that holds all services, at saturation.

    model_ms: time of the target's model per list, in passes that lists share, on the threads of one replica.
    """
    loop = passes * costs.pass_ms
    cpu = costs.threads * model_ms + loop + costs.orchestrator_ms
    return min(replicas * 1e3 / max(model_ms, loop), cores * 1e3 / cpu)


def _busy(way: Way, together: int, costs: Costs) -> float:
    return max(way.together_ms[together] / together, way.passes * costs.pass_ms)


def _latency(way: Way, together: int, costs: Costs) -> float:
    return way.together_ms[together] + way.draft_ms + costs.added_ms


def _waits(p99_ms: float, way: Way, together: int, costs: Costs) -> dict[str, float]:
    """Return the p99 of the wait that each service may have."""
    left = p99_ms - _latency(way, together, costs)
    shares = {name: share for name, share in WAIT_SHARES.items() if way.draft_ms or name != "draft"}
    return {name: left * share / sum(shares.values()) for name, share in shares.items()}


def _target(rate: float, way: Way, together: int, replicas: int, costs: Costs, sizes: Sizes) -> Station:
    busy, job = _busy(way, together, costs), way.together_ms[together]
    loop = rate / replicas * way.passes * costs.pass_ms / 1e3
    utilisation = rate * busy / 1e3 / replicas
    wait = wait_p99(utilisation, job, costs.variation)
    return Station(
        "target", replicas, _tenths(costs.threads + loop), model_gib("target", sizes), busy, utilisation, wait
    )


def _draft(rate: float, way: Way, wait_ms: float, costs: Costs, sizes: Sizes) -> Station:
    return _loop("draft", rate, way.draft_ms, way.passes, wait_ms, costs, model_gib("draft", sizes))


def _orchestrator(rate: float, way: Way, wait_ms: float, costs: Costs, sizes: Sizes) -> Station:
    """Size the orchestrators: a list begins there, and comes back after every pass."""
    memory, least = orchestrator_gib(sizes), costs.least_orchestrators
    return _loop("orchestrator", rate, costs.orchestrator_ms, way.passes + 1, wait_ms, costs, memory, least)


def _loop(
    service: str,
    rate: float,
    busy_ms: float,
    visits: float,
    wait_ms: float,
    costs: Costs,
    memory_gib: float,
    least: int = 1,
) -> Station:
    job = busy_ms / visits
    replicas = max(least, replicas_needed(rate, busy_ms, wait_ms, costs, job, visits))
    utilisation = rate * busy_ms / 1e3 / replicas
    wait = wait_p99(utilisation, job, costs.variation, visits)
    return Station(service, replicas, 1.0, memory_gib, busy_ms, utilisation, wait)


def _limits(
    rate: float,
    way: Way,
    together: int,
    stations: Sequence[Station],
    redis: RedisSize | None,
    costs: Costs,
    p99_ms: float,
) -> tuple[str, ...]:
    target, found = stations[0], list[str]()
    if redis and redis.megabytes_per_second * 1e6 > REDIS_BYTES_PER_SECOND:
        found.append(f"Redis' network: {redis.megabytes_per_second:,.0f} MB/s, one instance is assumed to carry 1,250")
    if redis and redis.calls_per_second > REDIS_CALLS_PER_SECOND:
        found.append(f"Redis' calls: {redis.calls_per_second:,.0f} a second, one instance is assumed to serve 100,000")
    most = math.ceil(rate * target.busy_ms / 1e3 / costs.most_utilisation)
    part = "model" if way.together_ms[together] / together >= way.passes * costs.pass_ms else "event loop"
    if target.replicas > 1.2 * most:
        found.append(
            f"the p99 of {p99_ms:g} ms: it asks for {target.replicas:,} targets, their {part}'s time for {most:,}"
        )
    else:
        found.append(f"the target's {part}: {target.busy_ms:.2f} ms of a replica per list")
    return tuple(found)


def _tenths(cores: float) -> float:
    return math.ceil(round(cores * 10, 6)) / 10
