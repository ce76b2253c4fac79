"""Reusable memory for the KV of open token trees, with a byte limit.

A fresh buffer of some megabytes costs a page fault for every 4 KiB, which takes longer than filling it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

from atspeed.engine.arrays import KvArray
from atspeed.engine.errors import OverloadedError

# Tokens of the smallest buffer: fewer would only add sizes. Chosen, not measured.
_SMALLEST = 64
# Share of the limit that is reserved for trees that outgrow their buffers: refusing one wastes the passes it has had.
# Chosen, not measured.
_GROWTH_SHARE = 1 / 8


def capacity_for(tokens: int) -> int:
    """Return the smallest capacity for so many tokens among 64, 96, 128, 192, 256, 384 ...: at most half too much."""
    power = _SMALLEST
    while power < tokens:
        power *= 2
    between = power * 3 // 4
    return between if power > _SMALLEST and tokens <= between else power


class BufferPool:
    """Buffers [layers, 2, capacity, kv_heads, head_dim] for open trees, `limit_bytes` of them, idle ones included.

    A tree first reserves a capacity, which is refused beyond the limit. It takes the buffer when its pass runs. An eighth of the
    limit is reserved for trees that grow, so that open trees win over new ones; a tree alone may have all of it. A taken
    buffer is given back, an unused reservation is cancelled. Buffers hold old values. Thread-safe. `reserve`, `cancel` and
    `give_back` neither allocate nor free memory, so an event loop can call them.

    Attributes:
        limit_bytes: the limit.
    """

    def __init__(self, make: Callable[[int], KvArray], limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._make = make
        self._bytes_per_token = make(1).nbytes
        self._lock = threading.Lock()
        self._reserved = 0  # tokens of buffers that are held or reserved
        self._idle: dict[int, list[KvArray]] = defaultdict(list)
        self._idle_tokens = 0

    @property
    def used_bytes(self) -> int:
        """Return the bytes that open trees hold or have reserved."""
        return self._reserved * self._bytes_per_token

    @property
    def idle_bytes(self) -> int:
        """Return the bytes of buffers that wait for the next tree."""
        return self._idle_tokens * self._bytes_per_token

    def reserve(self, capacity: int, *, growing: bool = False) -> None:
        """Reserve a buffer for a tree that is new or `growing`. Raises OverloadedError beyond the limit."""
        with self._lock:
            wanted = (self._reserved + capacity) * self._bytes_per_token
            limit = self.limit_bytes * (1 if growing or not self._reserved else 1 - _GROWTH_SHARE)
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
        """Take the reserved buffer: an idle one, else a new one, for which idle ones are freed."""
        with self._lock:
            dropped = []
            if self._idle[capacity]:
                self._idle_tokens -= capacity
                return self._idle[capacity].pop()
            while self._idle_tokens and self.used_bytes + self.idle_bytes > self.limit_bytes:
                dropped.append(self._drop())
        del dropped  # freed outside the lock
        return self._make(capacity)

    def give_back(self, buffer: KvArray) -> None:
        """Return a buffer to the pool. No caller may write to it afterwards."""
        capacity = buffer.shape[2]
        with self._lock:
            self._reserved -= capacity
            self._idle[capacity].append(buffer)
            self._idle_tokens += capacity

    def _drop(self) -> KvArray:
        """Remove an idle buffer of the largest capacity from the pool."""
        capacity = max(capacity for capacity, buffers in self._idle.items() if buffers)
        self._idle_tokens -= capacity
        return self._idle[capacity].pop()
