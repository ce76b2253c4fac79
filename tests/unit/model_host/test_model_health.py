"""Model health: failures that make a model unhealthy, and probes that make it healthy again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from atspeed.engine.errors import CapacityError, NoNumbersError, OverloadedError, PromptError
from atspeed.model_host.model_health import ModelHealth
from atspeed.observability import logs


class Model:
    """A model that fails its probes until `works` is set, with the changes of its health."""

    def __init__(self, unhealthy_after: int | None = 3) -> None:
        self.health = ModelHealth(unhealthy_after, self.probe, self.on_change, first_pause_seconds=0)
        self.changes: asyncio.Queue[bool] = asyncio.Queue()
        self.probed = asyncio.Semaphore(0)
        self.callers: list[Mapping[str, str]] = []
        self.works = False
        self.problem: Exception = MemoryError()

    async def probe(self) -> None:
        self.probed.release()
        self.callers.append(logs.peer())
        if not self.works:
            raise self.problem

    async def on_change(self, healthy: bool) -> None:
        self.changes.put_nowait(healthy)


@pytest.fixture
async def model() -> AsyncIterator[Model]:
    model = Model()
    yield model
    await model.health.close()


async def test_failures_in_a_row_make_it_unhealthy_until_a_probe_succeeds(model: Model) -> None:
    for _ in range(2):
        for _ in range(3):
            assert model.changes.empty()
            model.health.record_failure(RuntimeError())
        assert not model.health.healthy
        assert await model.changes.get() is False
        model.health.record_failure(RuntimeError())  # of a call that came before callers knew
        for _ in range(3):
            await model.probed.acquire()
        assert model.changes.empty()
        model.works = True
        assert await model.changes.get() is True
        model.works = False
    assert model.changes.empty()


@pytest.mark.parametrize("error", [RuntimeError(), NoNumbersError("")])
async def test_log_lines_of_probes_name_no_caller(model: Model, error: Exception) -> None:
    logs.bind_peer(lambda: {"peer": "10.0.0.1:5000"})
    for _ in range(3):
        model.health.record_failure(error)
    for _ in range(2):
        await model.probed.acquire()
    assert model.callers == [{}] * len(model.callers)


@pytest.mark.parametrize("error", [PromptError(""), CapacityError(""), OverloadedError("")])
async def test_errors_of_requests_and_limits_do_not_count(model: Model, error: Exception) -> None:
    for _ in range(10):
        model.health.record_failure(error)
    assert model.health.healthy


async def test_success_resets_the_count(model: Model) -> None:
    """A request that fails on every replica takes none away from other requests."""
    for _ in range(10):
        model.health.record_failure(RuntimeError())
        model.health.record_failure(RuntimeError())
        model.health.record_success()
    assert model.health.healthy


async def test_without_a_threshold_it_stays_healthy() -> None:
    model = Model(unhealthy_after=None)
    for _ in range(10):
        model.health.record_failure(RuntimeError())
    assert model.health.healthy


async def test_close_makes_the_version_healthy(model: Model) -> None:
    """A version that was unhealthy when it was released starts healthy when it is loaded again."""
    for _ in range(3):
        model.health.record_failure(RuntimeError())
    assert await model.changes.get() is False
    await model.health.close()
    assert await model.changes.get() is True


async def test_passes_without_numbers_make_it_unhealthy_only_if_the_probe_fails(model: Model) -> None:
    """One node may make every pass invalid that is planned, and plain passes go on serving all."""
    model.works = True
    for attempt in range(1, 4):
        for _ in range(3):
            model.health.record_failure(NoNumbersError())
        await model.probed.acquire()
        await asyncio.sleep(0)
        assert (model.health.healthy, model.changes.empty()) == (True, True), attempt
    model.works = False
    for _ in range(3):
        model.health.record_failure(NoNumbersError())
    assert await model.changes.get() is False
    assert not model.health.healthy
    model.works = True
    assert await model.changes.get() is True


@pytest.mark.parametrize("failures", [0, 2])
async def test_passes_without_numbers_count_with_those_that_fail(model: Model, failures: int) -> None:
    for _ in range(failures):
        model.health.record_failure(RuntimeError())
    for _ in range(3 - failures):
        model.health.record_failure(NoNumbersError())
    assert await model.changes.get() is False


async def test_overloaded_probe_does_not_count(model: Model) -> None:
    """A busy replica must not be taken away because it is busy."""
    model.problem = OverloadedError("")
    for _ in range(3):
        model.health.record_failure(NoNumbersError())
    await model.probed.acquire()
    await asyncio.sleep(0)
    assert (model.health.healthy, model.changes.empty()) == (True, True)


@pytest.mark.parametrize("works", [True, False])
async def test_failed_probe_at_start_makes_it_unhealthy(model: Model, works: bool) -> None:
    """The caller serves the model after `probe_at_start` has returned. By then the change must be published."""
    model.works = works
    await model.health.probe_at_start()
    assert model.health.healthy is works
    assert works == model.changes.empty()
    if not works:
        assert model.changes.get_nowait() is False


async def test_without_a_threshold_nothing_is_probed_at_start() -> None:
    model = Model(unhealthy_after=None)
    await model.health.probe_at_start()
    assert (model.health.healthy, model.changes.empty()) == (True, True)
