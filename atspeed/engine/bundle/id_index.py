"""Finds ids among millions: a hash table over fixed-width byte strings, as two flat arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int32, Int64, UInt64
from atspeed.engine.search.sampling import mix64

Ids = npt.NDArray[np.bytes_]

_CHUNK = 1 << 20  # ids hashed at once: what is held beside the table stays small


@dataclass(frozen=True)
class IdIndex:
    """A table of about one bucket per id. A look-up reads a bucket's bounds, its few ids, and nothing else.

    ids:   bytes [n], distinct and not empty; the array itself, not a copy.
    item:  int32 [n]; the indices of all ids, bucket by bucket.
    start: int32 [buckets + 1]; bucket b holds item[start[b] : start[b + 1]]. The number of buckets is a power of two.
    """

    ids: Ids
    item: Int32
    start: Int32

    @classmethod
    def of(cls, ids: Ids) -> IdIndex:
        """The table over some ids [n]. O(n log n) once: a second for ten million."""
        buckets = 1 << max(0, int(len(ids) - 1).bit_length())
        bucket = np.empty(len(ids), dtype=np.int32)
        for begin in range(0, len(ids), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            bucket[part] = _bucket(ids[part], buckets)
        start = np.zeros(buckets + 1, dtype=np.int32)
        np.cumsum(np.bincount(bucket, minlength=buckets), out=start[1:])
        return cls(ids, np.argsort(bucket).astype(np.int32), start)

    def find(self, keys: Ids) -> Int64:
        """Index of each key [m], -1 where it is not among the ids. The keys are as wide as the ids are."""
        bucket = _bucket(keys, len(self.start) - 1)
        begin, count = self.start[bucket], self.start[bucket + 1] - self.start[bucket]
        row = np.repeat(np.arange(len(keys)), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        candidate = self.item[begin[row] + within]
        same = self.ids[candidate] == keys[row]
        index = np.full(len(keys), -1, dtype=np.int64)
        index[row[same]] = candidate[same]
        return index


def _bucket(ids: Ids, buckets: int) -> Int64:
    """Bucket of each id [m]: the low bits of a hash of its bytes."""
    words = -(-ids.dtype.itemsize // 8)
    columns = np.ascontiguousarray(ids, dtype=f"S{8 * words}").view("<u8").reshape(len(ids), words).T
    digest: UInt64 = np.zeros(len(ids), dtype=np.uint64)
    for column in columns:
        digest = mix64(digest ^ column)
    return (digest & np.uint64(buckets - 1)).astype(np.int64)
