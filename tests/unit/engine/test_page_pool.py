"""The books of a device's pages: no page is lost, none is in two hands, and an erased one is overwritten before it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from atspeed.engine.errors import OverloadedError
from atspeed.engine.kv.page_pool import PagePool

PAGES = 24
CHAINS = {user: [f"{user}{n}".encode() for n in range(10)] for user in "abc"}


def pool_of(pages: int = PAGES) -> PagePool:
    return PagePool(pages, 1024, lambda _: None)


class Books(RuleBasedStateMachine):
    """Trees that look up, grow, publish and end in any order, with erasures; beside it what each page really contains."""

    def __init__(self) -> None:
        super().__init__()
        self.content: dict[int, bytes] = {}  # what was written to a page last; b"" for zeros
        self.pool = PagePool(PAGES, 1024, self.zero)
        self.trees: list[tuple[str, list[int], int]] = []  # user, pages, pages of the prompt
        self.erased: set[int] = set()

    def zero(self, pages: Sequence[int]) -> None:
        for page in pages:
            assert all(page not in held for _, held, _ in self.trees), "a page is overwritten under a tree"
            self.content[page] = b""
            self.erased.discard(page)

    @rule(user=st.sampled_from("abc"), length=st.integers(1, 10))
    def opens(self, user: str, length: int) -> None:
        keys = CHAINS[user][:length]
        held = self.pool.hold_chain(keys)
        assert [self.content[page] for page in held] == keys[: len(held)]
        others = any(pages for _, pages, _ in self.trees)
        try:
            more = self.pool.reserve(length - len(held), owned=len(held))
        except OverloadedError:
            assert others or self.pool.unclean
            self.pool.release(held)
            return
        assert self.erased.isdisjoint(more), "an erased page was given away before it was overwritten"
        self.trees.append((user, held + more, length))
        for page, key in zip(more, keys[len(held) :], strict=True):
            self.content[page] = key

    @precondition(lambda self: self.trees)
    @rule(which=st.integers(0, 99), publish=st.booleans())
    def grows(self, which: int, publish: bool) -> None:
        user, pages, prompt = self.trees[which % len(self.trees)]
        if publish:
            self.pool.put_chain(CHAINS[user][:prompt], pages[:prompt])
            return
        try:
            more = self.pool.reserve(1, growing=True, owned=len(pages))
        except OverloadedError:
            return
        assert self.erased.isdisjoint(more)
        assert all(more[0] not in held for _, held, _ in self.trees)
        pages.extend(more)
        self.content[more[0]] = b"a node"

    @precondition(lambda self: self.trees)
    @rule(which=st.integers(0, 99))
    def ends(self, which: int) -> None:
        _, pages, _ = self.trees.pop(which % len(self.trees))
        self.pool.release(pages)

    @rule(user=st.sampled_from("abc"), clean=st.booleans())
    def is_erased(self, user: str, clean: bool) -> None:
        cached = {key: page for key, page in self.pool._page_of.items() if key.startswith(user.encode())}
        assert self.pool.drop(lambda key: key.startswith(user.encode())) == len(cached)
        self.erased |= set(cached.values())
        assert self.pool.hold_chain(CHAINS[user]) == []
        if clean:
            asyncio.run(self.pool.clean())
            assert not self.pool.unclean

    @invariant()
    def books_are_right(self) -> None:
        self.pool.check_integrity()
        assert {page for _, held, _ in self.trees for page in held} == set(self.pool._holders)

    def teardown(self) -> None:
        for _, pages, _ in self.trees:
            self.pool.release(pages)
        self.trees.clear()
        asyncio.run(self.pool.clean())
        assert len(self.pool.reserve(PAGES)) == PAGES, "a page is lost"
        assert not self.erased


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_the_end_of_the_oldest_chain_is_evicted_first() -> None:
    pool = pool_of(6)
    for user in "ab":
        pages = pool.reserve(3)
        pool.put_chain(CHAINS[user][:3], pages)
        pool.release(pages)
    pool.reserve(2)
    assert len(pool.hold_chain(CHAINS["a"][:3])) == 1
    assert len(pool.hold_chain(CHAINS["b"][:3])) == 3
    assert pool.statistics.evictions == 2
    assert (pool.statistics.hits, pool.statistics.misses) == (4, 2)


def test_an_eighth_is_for_trees_that_grow() -> None:
    pool = pool_of(16)
    first = pool.reserve(10)
    with pytest.raises(
        OverloadedError, match=r"kv_device_mb: 5 pages of 0\.00 MiB are wanted, 4 of 16 are free for new"
    ):
        pool.reserve(5)
    assert len(pool.reserve(6, growing=True, owned=len(first))) == 6
    with pytest.raises(OverloadedError, match="0 of 16 are free for growing"):
        pool.reserve(1, growing=True)


def test_a_tree_alone_may_have_all_pages_its_cached_prefix_included() -> None:
    pool = pool_of(16)
    pages = pool.reserve(8)
    pool.put_chain(CHAINS["a"][:8], pages)
    pool.release(pages)
    held = pool.hold_chain(CHAINS["a"])
    assert len(pool.reserve(8, owned=len(held))) == 8


async def test_pages_stay_unclean_until_the_device_has_overwritten_them() -> None:
    fails = True

    def zero(_: Sequence[int]) -> None:
        if fails:
            raise RuntimeError("device")

    pool = PagePool(4, 1024, zero)
    pages = pool.reserve(4)
    pool.put_chain(CHAINS["a"][:4], pages)
    pool.release(pages)
    pool.drop(lambda _: True)
    with pytest.raises(RuntimeError, match="device"):
        await pool.clean()
    with pytest.raises(OverloadedError):
        pool.reserve(1)
    pool.check_integrity()
    fails = False
    await pool.clean()
    assert len(pool.reserve(4)) == 4
