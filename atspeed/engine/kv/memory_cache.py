"""Prefix KV in blocks: layout, keys, encoding, and the tier in memory.

A block holds the keys and values of `block_tokens` consecutive prompt tokens, of all layers. Its key is a link in a chain of
hashes over every token up to the block's end, so equal keys mean equal prefixes. A block is valid wherever its key is asked
for. Blocks of different weights, number formats, layouts or tenants never share a key.

A key begins with the key of the user whose prompt it belongs to, if the user is stored. So all blocks of a user can be found
and erased. Blocks before the first item of a prompt hold the template's tokens alone: they are the shared prefix, and begin
with `NO_USER_KEY`.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.tier import TierStatistics

# Part of every key and of every encoded block: another version reads none of the older blocks.
FORMAT_VERSION = 2
# 8 bytes of user key and a hash of 24: among 2^64 blocks, two share a hash with a probability of 2^-65.
KEY_BYTES = 32
USER_KEY_BYTES = 8
NO_USER_KEY = bytes(USER_KEY_BYTES)

KvDtype = Literal["float32", "float16", "bfloat16"]
"""Number formats of keys and values."""

_MAGIC = b"ATSPEEDK"
# Magic, format version, wire dtype, the five axes of the block, its key.
_IDENTITY = struct.Struct(f"<8sI4s5I{KEY_BYTES}s")
_CHECKSUM = struct.Struct("<I")
# The payload starts on a multiple of 16 bytes, the alignment of numpy's vectorised float loops.
_HEADER_BYTES = -(-(_IDENTITY.size + _CHECKSUM.size) // 16) * 16
_PADDING = bytes(_HEADER_BYTES - _IDENTITY.size - _CHECKSUM.size)


@dataclass(frozen=True)
class KvLayout:
    """The shape of one model's KV blocks. Index 0 of a block's second axis holds keys, index 1 values.

    Raises ValueError when a size is not positive or the dtype is unknown.

    Attributes:
        layers: number of layers.
        kv_heads: heads of keys and values.
        head_dim: values per head.
        dtype: number format.
        block_tokens: tokens per block.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: KvDtype
    block_tokens: int

    def __post_init__(self) -> None:
        if min(self.block_shape) < 1:
            raise ValueError(f"KV layout: every size must be positive: {self}")
        if self.dtype not in get_args(KvDtype):
            raise ValueError(f"KV layout: unknown dtype {self.dtype!r}")

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Return (layers, 2, block_tokens, kv_heads, head_dim)."""
        return (self.layers, 2, self.block_tokens, self.kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Return the bytes of one block, without its header."""
        return self.block_tokens * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of one token's keys and values, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.array_dtype.itemsize

    @property
    def array_dtype(self) -> np.dtype[np.generic]:
        """Return the dtype of a block's array. numpy has no bfloat16: its bytes are held as uint16."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)


@lru_cache(maxsize=1024)
def namespace(fingerprint: str, layout: KvLayout, tenant: str) -> bytes:
    """Return the namespace of a chain: format version, weights, layout with its dtype, tenant.

    JSON quotes its strings, so no fingerprint can be chosen such that it continues into the tenant's field.
    """
    return json.dumps([FORMAT_VERSION, fingerprint, asdict(layout), tenant], sort_keys=True).encode()


def block_keys(
    namespace: bytes,
    tokens: npt.NDArray[np.integer],
    block_tokens: int,
    user_key: bytes = NO_USER_KEY,
    *,
    template_tokens: int = 0,
) -> list[bytes]:
    """Return the key of every whole block of a prompt, [P // block_tokens] of KEY_BYTES bytes; equal in every process.

    key_i = u_i, h_i, where u_i is the user key and h_i = H(u_i, h_{i-1}, tokens of block i), with h_-1 = H(namespace). Blocks
    of users with different keys differ, but for the shared prefix: u_i is NO_USER_KEY when block i ends within the first
    `template_tokens`. An incomplete last block has no key. Raises ValueError for a user key of another length.

    Args:
        namespace: from `namespace`.
        tokens: int64 [P].
        block_tokens: tokens per block.
        user_key: the key of a stored user, USER_KEY_BYTES.
        template_tokens: the number of tokens at the beginning that are the template's and contain nothing of a user.
    """
    if len(user_key) != USER_KEY_BYTES:
        raise ValueError(f"user_key: must have {USER_KEY_BYTES} bytes, got {len(user_key)}")
    wire = np.ascontiguousarray(tokens, dtype="<i8").tobytes()  # 8 bytes a token
    step = block_tokens * 8
    size = KEY_BYTES - USER_KEY_BYTES
    link = hashlib.blake2b(namespace, digest_size=size, person=b"atspeed-kv-root").digest()
    keys = []
    for block in range(len(wire) // step):
        user = NO_USER_KEY if (block + 1) * block_tokens <= template_tokens else user_key
        message = user + link + wire[block * step : (block + 1) * step]
        link = hashlib.blake2b(message, digest_size=size, person=b"atspeed-kv-block").digest()
        keys.append(user + link)
    return keys


def user_key_of(key: bytes) -> bytes:
    """Return the user key of a block's key; NO_USER_KEY for a block of the shared prefix."""
    return key[:USER_KEY_BYTES]


def shared_prefix_length(keys: Sequence[bytes]) -> int:
    """Return the number of a chain's keys that belong to the shared prefix. They come first."""
    return sum(user_key_of(key) == NO_USER_KEY for key in keys)


def encode_block(layout: KvLayout, key: bytes, block: KvArray) -> bytes:
    """Encode a block: identity (magic, format version, dtype, shape, key), CRC-32 of the payload, the payload.

    Little-endian, row-major. Raises ValueError when block or key do not have this layout.
    """
    _check_array(layout, block, block_tokens=layout.block_tokens)
    payload = np.ascontiguousarray(block, dtype=_wire_dtype(layout))
    return b"".join((_identity(layout, key), _CHECKSUM.pack(zlib.crc32(payload.data)), _PADDING, payload.data))


def decode_block(layout: KvLayout, key: bytes, data: bytes) -> KvArray | None:
    """Decode a block that `encode_block` wrote for this layout and key. None if it is truncated, damaged or foreign.

    The array is read-only and its own, so `MemoryKvCache` keeps it without another copy. The checksum detects accidents: CRC-32
    finds all errors within 32 consecutive bits and all but one in 2^32 of the others. It takes 0.4 ms/MB, less than the fetch.
    It proves no origin. A keyed hash costs four times as much, and anyone who can write to this Redis can forge histories.
    """
    if len(key) != KEY_BYTES or len(data) != _HEADER_BYTES + layout.block_bytes:
        return None
    if not data.startswith(_identity(layout, key)):
        return None
    payload = memoryview(data)[_HEADER_BYTES:]
    if data[_IDENTITY.size : _HEADER_BYTES] != _CHECKSUM.pack(zlib.crc32(payload)) + _PADDING:
        return None
    block = np.frombuffer(payload, dtype=_wire_dtype(layout)).reshape(layout.block_shape)
    return _read_only_copy(block.astype(layout.array_dtype, copy=False))


def copy_blocks(layout: KvLayout, kv: KvArray, start: int, stop: int) -> list[KvArray]:
    """Copy the whole blocks `start` .. `stop` - 1 of a prefix [layers, 2, P, kv_heads, head_dim] into read-only arrays.

    numpy copies outside the GIL. Raises ValueError when `kv` does not have this layout or holds fewer tokens.
    """
    step = layout.block_tokens
    _check_array(layout, kv, block_tokens=max(kv.shape[2] if kv.ndim == 5 else 0, stop * step))
    return [_read_only_copy(kv[:, :, block * step : (block + 1) * step]) for block in range(start, stop)]


def _read_only_copy(array: KvArray) -> KvArray:
    copy = np.array(array, order="C")
    copy.flags.writeable = False
    return copy


def _is_immutable(block: KvArray) -> bool:
    """Return whether a block is a read-only array of its own, and no view of another array's memory."""
    return block.base is None and not block.flags.writeable


def _check_array(layout: KvLayout, array: KvArray, *, block_tokens: int) -> None:
    expected = (layout.layers, 2, block_tokens, layout.kv_heads, layout.head_dim)
    if array.shape != expected or array.dtype.name != layout.array_dtype.name:
        raise ValueError(f"KV: {array.dtype} {array.shape}, but the layout has {layout.dtype} {expected}")


def _identity(layout: KvLayout, key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: must have {KEY_BYTES} bytes, got {len(key)}")
    return _IDENTITY.pack(_MAGIC, FORMAT_VERSION, _wire_dtype(layout).str.encode(), *layout.block_shape, key)


def _wire_dtype(layout: KvLayout) -> np.dtype[np.generic]:
    return layout.array_dtype.newbyteorder("<")


@dataclass(frozen=True)
class MemoryTierStatistics(TierStatistics):
    """Content and counters of a memory tier since it was made.

    Attributes:
        blocks: blocks that are held now.
        used_bytes: their bytes.
        evictions: blocks that were evicted because of the limit.
    """

    blocks: int = 0
    used_bytes: int = 0
    evictions: int = 0


class MemoryKvCache:
    """Blocks by key in memory, at most `limit_bytes` of them; the least recently used are evicted first (LRU).

    The contract:

    - Content-addressed: a key stands for one content, so putting a key that is present keeps the block that is there.
    - A block that is a read-only array of its own is kept without a copy: the caller must hold no writable view of it. Any other
      block is copied. Blocks are returned read-only, and a block that a caller holds outlives its eviction, unchanged.
    - `used_bytes` is exactly the sum of the blocks' array bytes, and at most `limit_bytes` after every call. Keys and
      bookkeeping, about 300 bytes a block, are not counted. A block beyond the limit is not kept and evicts nothing.
    - A chain is used from its head, so its head is evicted last: for all methods that take a chain, earlier keys count as the
      more recently used. The beginning of a chain that exceeds the limit stays.
    - No call blocks, awaits, or copies a block that is an array of its own. Not thread-safe: call it from the event loop only.

    Attributes:
        name: the tier's name, a label of metrics.
        limit_bytes: the limit.
    """

    name = "memory"

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes: {limit_bytes} is negative")
        self.limit_bytes = limit_bytes
        self._blocks: OrderedDict[bytes, KvArray] = OrderedDict()
        self._bytes = 0
        self._hits = 0
        self._misses = 0
        self._evictions = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def used_bytes(self) -> int:
        """Return the bytes of the blocks that are held."""
        return self._bytes

    @property
    def statistics(self) -> MemoryTierStatistics:
        """Return the counters as they are now."""
        return MemoryTierStatistics(self._hits, self._misses, len(self._blocks), self._bytes, self._evictions)

    def get_chain(self, keys: Sequence[bytes]) -> list[KvArray]:
        """Return the blocks of the longest leading run of `keys` that is present, read-only."""
        run = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            run.append(block)
        self.touch(keys[: len(run)])
        self._hits += len(run)
        self._misses += len(keys) - len(run)
        return run

    def put_chain(self, keys: Sequence[bytes], new: Sequence[KvArray]) -> list[KvArray]:
        """Keep the last blocks of a chain: `new` belongs to the last `len(new)` of `keys`.

        Returns the read-only blocks of these keys, kept or not. Until the call returns, the tier may exceed its limit by `new`.
        Raises ValueError when there are fewer keys than blocks.
        """
        if len(new) > len(keys):
            raise ValueError(f"memory KV: {len(new)} blocks for a chain of {len(keys)}")
        last = keys[len(keys) - len(new) :]
        stored = [self._insert(key, block) for key, block in zip(last, new, strict=True)]
        # Before the eviction, which then takes the end of this chain and not its head.
        self.touch(keys)
        self._evict()
        return stored

    def touch(self, keys: Iterable[bytes]) -> None:
        """Make the present ones of `keys` the most recently used; the first of them is evicted last."""
        for key in reversed(list(keys)):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def drop(self, unwanted: Callable[[bytes], bool]) -> int:
        """Drop every block whose key is unwanted. Looks at all keys; returns the number of blocks."""
        dropped = [key for key in self._blocks if unwanted(key)]
        for key in dropped:
            self._bytes -= self._blocks.pop(key).nbytes
        return len(dropped)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the accounting is exact, the limit is kept and every block is immutable."""
        held = sum(block.nbytes for block in self._blocks.values())
        if held != self._bytes:
            raise RuntimeError(f"memory KV: {held} bytes held, {self._bytes} accounted for")
        if held > self.limit_bytes:
            raise RuntimeError(f"memory KV: {held} bytes held, the limit is {self.limit_bytes}")
        for key, block in self._blocks.items():
            if not _is_immutable(block):
                raise RuntimeError(f"memory KV: block {key.hex()} is not a read-only array of its own")

    def _insert(self, key: bytes, block: KvArray) -> KvArray:
        present = self._blocks.get(key)
        if present is not None:
            return present
        own = block if _is_immutable(block) else _read_only_copy(block)
        if own.nbytes <= self.limit_bytes:
            self._blocks[key] = own
            self._bytes += own.nbytes
        return own

    def _evict(self) -> None:
        while self._bytes > self.limit_bytes:
            _, block = self._blocks.popitem(last=False)
            self._bytes -= block.nbytes
            self._evictions += 1
