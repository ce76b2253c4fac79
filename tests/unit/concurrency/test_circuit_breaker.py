"""The states of a circuit breaker: closed, open, half-open."""

from __future__ import annotations

from atspeed.concurrency.circuit_breaker import CircuitBreaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def breaker(clock: Clock, threshold: int = 2) -> CircuitBreaker:
    return CircuitBreaker(threshold, open_seconds=10.0, clock=clock)


def test_failures_below_the_threshold_leave_it_closed() -> None:
    circuit = breaker(Clock())
    circuit.record_failure()
    circuit.record_success()
    circuit.record_failure()
    assert circuit.allow()
    assert not circuit.is_open


def test_failures_in_a_row_open_it_for_its_time() -> None:
    clock = Clock()
    circuit = breaker(clock)
    circuit.record_failure()
    circuit.record_failure()
    assert circuit.is_open
    assert not circuit.allow()
    clock.now = 10.0
    assert circuit.allow()


def test_half_open_lets_one_probe_through() -> None:
    clock = Clock()
    circuit = breaker(clock, threshold=1)
    circuit.record_failure()
    clock.now = 10.0
    assert [circuit.allow(), circuit.allow()] == [True, False]
    circuit.record_success()
    assert [circuit.allow(), circuit.allow()] == [True, True]


def test_a_failed_probe_opens_it_again() -> None:
    clock = Clock()
    circuit = breaker(clock)
    circuit.record_failure()
    circuit.record_failure()
    clock.now = 10.0
    assert circuit.allow()
    circuit.record_failure()
    assert not circuit.allow()


def test_a_retry_hint_shortens_the_open_state_and_never_lengthens_it() -> None:
    for hint, until in ((1.0, 1.0), (60.0, 10.0)):
        clock = Clock()
        circuit = breaker(clock, threshold=1)
        circuit.record_failure(retry_after_seconds=hint)
        clock.now = until - 0.01
        assert circuit.is_open
        clock.now = until
        assert not circuit.is_open
