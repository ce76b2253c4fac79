"""Comparison of the capacity model with a result of `bench load`.

The prediction uses the in-process baseline of one replica, the passes of a list, the machine's cores, and the services' time of a
list without load. Measured is the throughput at saturation; in files without one, the highest rate that was achieved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from atspeed.benchmarks.results import Result
from atspeed.capacity.errors import CapacityError
from atspeed.capacity.model import Costs, host_saturation, wait_p99
from atspeed.capacity.sources import PLAIN, baseline_ms


@dataclass(frozen=True)
class Comparison:
    """A predicted figure beside the measured one, of plain beam search.

    Attributes:
        figure: `saturation`, in lists per second, or `p99`, in ms.
        offered: lists per second that were sent, for a p99.
        error: predicted over measured, less 1.
    """

    figure: str
    replicas: int
    offered: float | None
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Return the relative error."""
        return self.predicted / self.measured - 1


def compare(result: Result, costs: Costs) -> list[Comparison]:
    """Return both figures for every number of replicas. p99s are of rates below four fifths of the predicted saturation.

    Raises CapacityError when the file is no result of `bench load`, or lacks a field.
    """
    if result.header.get("benchmark") != "load":
        raise CapacityError(f"not a result of bench load but of {result.header.get('benchmark')}")
    try:
        rows = [row for row in result.rows if row["mode"] == PLAIN]
        costs = replace(costs, threads=int(result.header["threads"]))
        cores = int(result.header["machine"]["cores"])
        model = baseline_ms(result)
        found = list[Comparison]()
        for replicas in sorted({int(row["replicas"]) for row in rows}):
            some = [row for row in rows if row["replicas"] == replicas]
            passes = max(float(row["target_passes_mean"]) for row in some)
            saturation = host_saturation(replicas, model, passes, costs, cores)
            measured = _saturated(result.header, replicas, some)
            found.append(Comparison("saturation", replicas, None, saturation, measured))
            found += _tails(some, replicas, model, saturation, costs)
    except (KeyError, TypeError, ValueError) as error:
        raise CapacityError(f"the result of load has another format: {error!r}") from error
    if not found:
        raise CapacityError(f"the result of load has no rows of {PLAIN}")
    return found


def _tails(
    rows: list[Mapping[str, Any]], replicas: int, model: float, saturation: float, costs: Costs
) -> list[Comparison]:
    found = list[Comparison]()
    for row in rows:
        rate, measured = float(row["achieved_rps"]), row["p99_ms"]
        if measured and rate < 0.8 * saturation:
            wait = wait_p99(rate / saturation, model, costs.variation)
            predicted = float(row["unloaded_p50_ms"]) + wait
            found.append(Comparison("p99", replicas, float(row["offered_rps"]), predicted, float(measured)))
    return found


def _saturated(header: Mapping[str, Any], replicas: int, rows: list[Mapping[str, Any]]) -> float:
    loop = header.get("saturated", {}).get(str(replicas), {}).get(PLAIN)
    return float(loop["searches_per_second"]) if loop else max(float(row["achieved_rps"]) for row in rows)
