"""Checks of the soak run, on made-up records."""

from __future__ import annotations

import pytest

from atspeed.benchmarks.soak import Bounds, ProcessSample, SoakRecord, checks, growths

END, WARM_UP = 1000, 200
MB = 2**20


def run_of(*, memory_per_second: float = 0.0, threads_at_end: int = 8, slowdown: float = 0.0) -> SoakRecord:
    """A sample and two requests a second; before the warm-up is over everything grows fast."""
    run = SoakRecord()
    for at in range(END):
        warming = 500 * MB * min(at, WARM_UP) / WARM_UP
        memory = int(warming + memory_per_second * max(0, at - WARM_UP))
        threads = threads_at_end if at > END - 300 else 8
        run.samples.setdefault("target-0", []).append(ProcessSample(at, memory, 30, threads))
        late = slowdown if at >= (WARM_UP + END) / 2 else 0.0
        run.latencies += [(at, 0.01), (at, 0.1 * (1 + late))]
    return run


def not_level(run: SoakRecord) -> list[str]:
    return [check.what for check in checks(run, WARM_UP, END, Bounds()) if not check.level]


def test_growth_during_warm_up_is_ignored() -> None:
    assert not_level(run_of()) == []


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (run_of(memory_per_second=0.04 * MB), "target-0: more MB of memory"),  # 25 MB over the time that is compared
        (run_of(threads_at_end=12), "target-0: more threads"),
        (run_of(slowdown=0.2), "p99, relative drift"),
        (SoakRecord(failures=["UNAVAILABLE: gone"]), "failed requests"),
        (SoakRecord(left_behind=1), "recommendations left behind"),
    ],
)
def test_growth_after_warm_up_fails_a_check(run: SoakRecord, found: str) -> None:
    assert not_level(run) == [found]


def test_growth_within_bounds_is_allowed() -> None:
    assert not_level(run_of(memory_per_second=0.02 * MB, threads_at_end=10, slowdown=0.05)) == []


def test_growth_is_given_per_list_and_per_crashed_client() -> None:
    run = run_of(memory_per_second=2048.0)  # of two lists each
    run.crashes = [10.0, *(float(at) for at in range(WARM_UP, END, 4))]
    (line,) = growths(run, WARM_UP, END)
    assert line == "target-0: 1.00 KB of memory for each of 1280 lists, or 8.0 for each of 160 crashed clients"
