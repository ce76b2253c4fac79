"""Books of a device's pages: holders of KV, cached prefixes, erasure.

A page has the size of a block of the prefix cache. This module keeps the books; `DevicePools` holds the keys and values.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from atspeed.engine.errors import OverloadedError
from atspeed.engine.kv.memory_cache import MemoryTierStatistics

# Share of the pool that is reserved for trees that grow, as in `buffer_pool`. Chosen, not measured.
_GROWTH_SHARE = 1 / 8


class PagePool:
    """Books of a device's pages: which are free, who holds which, and which contain a block of the prefix cache.

    The contract:

    - A page is held by any number of holders. A page that nobody holds and that has no key is free; one with a key stays cached
      until its room is needed, the least recently used first. A held page is never evicted.
    - A chain is used from its head, so its head is evicted last.
    - A page that is dropped for an erasure is unclean. It gets no new holder before `clean` has overwritten it with zeros, and
      it is not overwritten before its last holder has released it.
    - Thread-safe. No method but `clean` touches the device, and none blocks.

    Args:
        pages: the number of pages.
        page_bytes: the bytes of one page, over all layers.
        zero: overwrites pages with zeros on the device; called in a worker thread.

    Attributes:
        name: the tier's name, a label of metrics.
    """

    name = "device"

    def __init__(self, pages: int, page_bytes: int, zero: Callable[[Sequence[int]], None]) -> None:
        self.pages = pages
        self.page_bytes = page_bytes
        self._zero = zero
        self._lock = threading.Lock()
        self._free = list(range(pages - 1, -1, -1))
        self._holders: dict[int, int] = {}  # pages that are held
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached pages that nobody holds, the oldest first
        self._condemned: set[int] = set()  # held pages that have to be overwritten after their last holder
        self._unclean: list[int] = []
        self._cleaning = 0
        self._hits = 0
        self._misses = 0
        self._evictions = 0

    @property
    def limit_bytes(self) -> int:
        """Return the bytes of the pool."""
        return self.pages * self.page_bytes

    @property
    def unclean(self) -> int:
        """Return the number of pages that wait for `clean`."""
        return len(self._unclean)

    @property
    def statistics(self) -> MemoryTierStatistics:
        """Return the counters as they are now. Its blocks are the cached ones."""
        cached = len(self._page_of)
        return MemoryTierStatistics(self._hits, self._misses, cached, cached * self.page_bytes, self._evictions)

    def hold_chain(self, keys: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest leading run of `keys` that is cached, each with one more holder."""
        with self._lock:
            run = []
            for key in keys:
                page = self._page_of.get(key)
                if page is None:
                    break
                run.append(page)
            self._hold(run)
            self._hits += len(run)
            self._misses += len(keys) - len(run)
            return run

    def hold(self, pages: Sequence[int]) -> None:
        """Add a holder to pages that are held already."""
        with self._lock:
            self._hold(pages)

    def reserve(self, count: int, *, growing: bool = False, owned: int = 0) -> list[int]:
        """Return so many pages with one holder, for a tree that is new or `growing` and holds `owned` pages already.

        Cached pages that nobody holds are evicted for it. Raises OverloadedError when there are too few; nothing is evicted
        then. An eighth of the pool is for growing trees; a tree alone may have all of it.
        """
        with self._lock:
            room = len(self._free) + len(self._idle)
            kept = 0 if growing or len(self._holders) <= owned else int(self.pages * _GROWTH_SHARE)
            if count > room - kept:
                raise OverloadedError(
                    f"kv_device_mb: {count} pages of {self.page_bytes / 2**20:.2f} MiB are wanted, "
                    f"{max(0, room - kept)} of {self.pages} are free for {'growing' if growing else 'new'} streams"
                )
            while len(self._free) < count:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
                self._evictions += 1
                self._free.append(page)
            taken = [self._free.pop() for _ in range(count)]
            self._hold(taken)
            return taken

    def put_chain(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Cache held pages by key. A key that is cached keeps its page: both have the same content."""
        with self._lock:
            for key, page in zip(keys, pages, strict=True):
                if key not in self._page_of and page not in self._key_of and page not in self._condemned:
                    self._page_of[key] = page
                    self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Remove a holder from each page of a chain."""
        with self._lock:
            for page in reversed(pages):  # so that the head becomes the most recently used
                self._holders[page] -= 1
                if self._holders[page]:
                    continue
                del self._holders[page]
                if page in self._condemned:
                    self._condemned.remove(page)
                    self._unclean.append(page)
                elif page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def drop(self, unwanted: Callable[[bytes], bool]) -> int:
        """Drop every cached page whose key is unwanted, and mark it unclean. Looks at all keys; returns the number of pages."""
        with self._lock:
            dropped = [key for key in self._page_of if unwanted(key)]
            for key in dropped:
                page = self._page_of.pop(key)
                del self._key_of[page]
                if page in self._holders:
                    self._condemned.add(page)
                else:
                    del self._idle[page]
                    self._unclean.append(page)
            return len(dropped)

    async def clean(self) -> None:
        """Overwrite the unclean pages with zeros in a worker thread, and free them. After a failure they stay unclean."""
        with self._lock:
            pages, self._unclean = self._unclean, []
            self._cleaning += len(pages)
        if not pages:
            return
        done = False
        try:
            await asyncio.to_thread(self._zero, pages)
            done = True
        finally:
            with self._lock:
                self._cleaning -= len(pages)
                (self._free if done else self._unclean).extend(pages)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page is in exactly one state and both directions of the index agree."""
        with self._lock:
            states = [self._free, self._holders, self._idle, self._unclean]
            listed = [page for state in states for page in state]
            if len(listed) != len(set(listed)) or len(listed) + self._cleaning != self.pages:
                raise RuntimeError(f"page pool: {self.pages} pages, listed {sorted(listed)}")
            if {page: key for key, page in self._page_of.items()} != self._key_of:
                raise RuntimeError("page pool: keys and pages do not match")
            _require("a count of holders", all(count > 0 for count in self._holders.values()))
            _require("an idle page", all(page in self._key_of for page in self._idle))
            _require("a cached page", all(page in self._idle or page in self._holders for page in self._key_of))
            _require("a condemned page", self._condemned <= self._holders.keys() - self._key_of.keys())

    def _hold(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
            self._idle.pop(page, None)


def _require(what: str, holds: bool) -> None:
    if not holds:
        raise RuntimeError(f"page pool: {what} is in a wrong state")
