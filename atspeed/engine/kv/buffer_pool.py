"""Memory for the keys and values of open token trees: a byte limit, and buffers that go from one tree to the next.

A fresh buffer of some megabytes costs the kernel a page fault for every 4 KiB, which is more than it costs to fill it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

from atspeed.engine.arrays import KvArray
from atspeed.engine.errors import OverloadedError

_SMALLEST = 64
# Of the limit, for trees that outgrow their buffers: one that is refused then has been served in vain.
_FOR_GROWTH = 1 / 8


def capacity_for(tokens: int) -> int:
    """The least capacity that a buffer for so many tokens may have: 64, 96, 128, 192, 256, 384 ... at most half too many."""
    power = _SMALLEST
    while power < tokens:
        power *= 2
    between = power * 3 // 4
    return between if power > _SMALLEST and tokens <= between else power


class BufferPool:
    """Buffers [layers, 2, capacity, kv_heads, head_dim] for open trees, `limit_bytes` of them, idle ones included.

    First a tree reserves a capacity, which is refused beyond the limit; when its pass runs it takes the buffer. An eighth of the
    limit is for trees that grow, so that those that are open win over new ones; a tree alone may have all of it. A buffer
    that was taken is given back, a reservation that was not used is cancelled. Buffers are dirty. Thread-safe: `reserve`,
    `cancel` and `give_back` neither allocate nor free memory, so they are fit for an event loop.
    """

    def __init__(self, make: Callable[[int], KvArray], limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._make = make
        self._bytes_per_token = make(1).nbytes
        self._lock = threading.Lock()
        self._reserved = 0  # tokens of buffers that are held, and of those still to be taken
        self._idle: dict[int, list[KvArray]] = defaultdict(list)
        self._idle_tokens = 0

    @property
    def used_bytes(self) -> int:
        """Bytes that open trees hold or have reserved."""
        return self._reserved * self._bytes_per_token

    @property
    def idle_bytes(self) -> int:
        """Bytes that wait for the next tree."""
        return self._idle_tokens * self._bytes_per_token

    def reserve(self, capacity: int, *, growing: bool = False) -> None:
        """Set a buffer aside, for a tree that is new or `growing`.

        Raises OverloadedError when it does not fit beside those of the other open trees.
        """
        with self._lock:
            wanted = (self._reserved + capacity) * self._bytes_per_token
            limit = self.limit_bytes * (1 if growing or not self._reserved else 1 - _FOR_GROWTH)
            if wanted > limit:
                raise OverloadedError(
                    f"kv_open_mb: the KV of open streams would take {wanted / 2**20:.1f} MiB, "
                    f"the limit for {'growing' if growing else 'new'} ones is {limit / 2**20:.1f}"
                )
            self._reserved += capacity

    def cancel(self, capacity: int) -> None:
        """Undo `reserve` before `take`."""
        with self._lock:
            self._reserved -= capacity

    def take(self, capacity: int) -> KvArray:
        """The buffer that was reserved: an idle one, else a new one, for which idle ones make way."""
        with self._lock:
            dropped = []
            if self._idle[capacity]:
                self._idle_tokens -= capacity
                return self._idle[capacity].pop()
            while self._idle_tokens and self.used_bytes + self.idle_bytes > self.limit_bytes:
                dropped.append(self._drop())
        del dropped  # what frees memory need not hold the lock
        return self._make(capacity)

    def give_back(self, buffer: KvArray) -> None:
        """Take a buffer back. Nobody may write to it any more."""
        capacity = buffer.shape[2]
        with self._lock:
            self._reserved -= capacity
            self._idle[capacity].append(buffer)
            self._idle_tokens += capacity

    def _drop(self) -> KvArray:
        """One idle buffer of the largest capacity, out of the pool."""
        capacity = max(capacity for capacity, buffers in self._idle.items() if buffers)
        self._idle_tokens -= capacity
        return self._idle[capacity].pop()
