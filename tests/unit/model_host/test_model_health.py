"""When a model counts as unfit, and how it comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from atspeed.engine.errors import CapacityError, NoNumbersError, OverloadedError, PromptError
from atspeed.model_host.model_health import ModelHealth


class Model:
    """One that fails its rehearsals until it is told otherwise, and what is declared of it."""

    def __init__(self, unhealthy_after: int = 3) -> None:
        self.fitness = ModelHealth(unhealthy_after, self.rehearse, self.declare, first_pause_seconds=0)
        self.declared: asyncio.Queue[bool] = asyncio.Queue()
        self.rehearsed = asyncio.Semaphore(0)
        self.works = False
        self.problem: Exception = MemoryError()

    async def rehearse(self) -> None:
        self.rehearsed.release()
        if not self.works:
            raise self.problem

    async def declare(self, fit: bool) -> None:
        self.declared.put_nowait(fit)


@pytest.fixture
async def model() -> AsyncIterator[Model]:
    model = Model()
    yield model
    await model.fitness.close()


async def test_failures_in_a_row_make_it_unfit_until_a_rehearsal_works(model: Model) -> None:
    for _ in range(2):
        for _ in range(3):
            assert model.declared.empty()
            model.fitness.failed(RuntimeError())
        assert not model.fitness.fit
        assert await model.declared.get() is False
        model.fitness.failed(RuntimeError())  # of a call that came before callers knew
        for _ in range(3):
            await model.rehearsed.acquire()
        assert model.declared.empty()
        model.works = True
        assert await model.declared.get() is True
        model.works = False
    assert model.declared.empty()


@pytest.mark.parametrize("error", [PromptError(""), CapacityError(""), OverloadedError("")])
async def test_what_is_the_requests_own_fault_or_a_limit_does_not_count(model: Model, error: Exception) -> None:
    for _ in range(10):
        model.fitness.failed(error)
    assert model.fitness.fit


async def test_one_that_works_between_them_starts_the_count_anew(model: Model) -> None:
    """One request that fails wherever it goes takes no replica away that serves others."""
    for _ in range(10):
        model.fitness.failed(RuntimeError())
        model.fitness.failed(RuntimeError())
        model.fitness.passed()
    assert model.fitness.fit


async def test_it_can_be_told_not_to_judge() -> None:
    model = Model(unhealthy_after=0)
    for _ in range(10):
        model.fitness.failed(RuntimeError())
    assert model.fitness.fit


async def test_the_end_leaves_nothing_behind(model: Model) -> None:
    """A version that was unfit when it went is judged anew when it comes again."""
    for _ in range(3):
        model.fitness.failed(RuntimeError())
    assert await model.declared.get() is False
    await model.fitness.close()
    assert await model.declared.get() is True


async def test_passes_without_numbers_make_it_unfit_only_where_plain_ones_have_none_either(model: Model) -> None:
    """One node may spoil every pass that is planned, and plain passes go on serving all."""
    model.works = True
    for rehearsed in range(1, 4):
        for _ in range(3):
            model.fitness.failed(NoNumbersError())
        await model.rehearsed.acquire()
        await asyncio.sleep(0)
        assert (model.fitness.fit, model.declared.empty()) == (True, True), rehearsed
    model.works = False
    for _ in range(3):
        model.fitness.failed(NoNumbersError())
    assert await model.declared.get() is False
    assert not model.fitness.fit
    model.works = True
    assert await model.declared.get() is True


@pytest.mark.parametrize("failures", [0, 2])
async def test_passes_without_numbers_count_with_those_that_fail(model: Model, failures: int) -> None:
    for _ in range(failures):
        model.fitness.failed(RuntimeError())
    for _ in range(3 - failures):
        model.fitness.failed(NoNumbersError())
    assert await model.declared.get() is False


async def test_a_rehearsal_that_finds_no_room_says_nothing_of_the_model(model: Model) -> None:
    """A busy replica must not be taken away because it is busy."""
    model.problem = OverloadedError("")
    for _ in range(3):
        model.fitness.failed(NoNumbersError())
    await model.rehearsed.acquire()
    await asyncio.sleep(0)
    assert (model.fitness.fit, model.declared.empty()) == (True, True)


@pytest.mark.parametrize("works", [True, False])
async def test_one_whose_rehearsal_fails_is_unfit_before_it_is_asked(model: Model, works: bool) -> None:
    """The caller of `examine` serves it when that has returned: by then everyone has to know."""
    model.works = works
    await model.fitness.examine()
    assert model.fitness.fit is works
    assert works == model.declared.empty()
    if not works:
        assert model.declared.get_nowait() is False


async def test_what_is_not_to_be_judged_is_not_examined() -> None:
    model = Model(unhealthy_after=0)
    await model.fitness.examine()
    assert (model.fitness.fit, model.declared.empty()) == (True, True)
