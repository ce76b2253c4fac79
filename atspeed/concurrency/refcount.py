"""Reference count of a shared object."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager


class RefCount:
    """Counts the references to a shared object, such as a model or a snapshot. For one event loop.

    Attributes:
        count: number of references.
    """

    def __init__(self) -> None:
        self.count = 0
        self._released_at = time.monotonic()
        self._unused = asyncio.Event()
        self._unused.set()

    def acquire(self) -> None:
        """Add a reference."""
        self.count += 1
        self._unused.clear()

    def release(self) -> bool:
        """Remove a reference. Returns True if it was the last one."""
        self.count -= 1
        self._released_at = time.monotonic()
        if not self.count:
            self._unused.set()
        return not self.count

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold a reference for the length of the block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def unused_for(self, seconds: float) -> bool:
        """Return whether there has been no reference for `seconds`."""
        return not self.count and time.monotonic() - self._released_at >= seconds

    async def wait_unused(self) -> None:
        """Wait until there is no reference. Another one may appear before the waiter runs again."""
        while self.count:
            await self._unused.wait()
