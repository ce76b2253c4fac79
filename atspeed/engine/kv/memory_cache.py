"""Prefix KV in blocks: their layout, their keys, their bytes, and the tier that keeps them in memory.

A block holds the keys and values of `block_tokens` consecutive prompt tokens, of all layers. Its key is a link in a
chain of hashes over every token up to its end, so an equal key means an equal prefix: a block is valid wherever its key
is asked for, and blocks of different weights, number formats, layouts or tenants never meet. A key begins with the tag of
the user whose prompt it is of, where that is a stored one: so all that is kept of a user can be found, and forgotten. Blocks
before the first item of a prompt hold the template's words alone and are nobody's.
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
from typing import Literal

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import KvArray

FORMAT_VERSION = 2
KEY_BYTES = 32
OWNER_BYTES = 8
NO_OWNER = bytes(OWNER_BYTES)

"""One block [layers, 2, block_tokens, kv_heads, head_dim], or a prefix [layers, 2, P, kv_heads, head_dim]."""

_MAGIC = b"ATSPEEDK"
# Magic, format version, wire dtype, the five axes of the block, its key.
_IDENTITY = struct.Struct(f"<8sI4s5I{KEY_BYTES}s")
_CHECKSUM = struct.Struct("<I")
# The payload starts on a multiple of the alignment that numpy's float loops like.
_HEADER_BYTES = -(-(_IDENTITY.size + _CHECKSUM.size) // 16) * 16
_PADDING = bytes(_HEADER_BYTES - _IDENTITY.size - _CHECKSUM.size)


@dataclass(frozen=True)
class KvLayout:
    """The shape of one model's KV blocks. Index 0 of a block's second axis holds keys, index 1 values.

    Raises ValueError when a size is not positive or the dtype is unknown.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Literal["float32", "float16"]
    block_tokens: int

    def __post_init__(self) -> None:
        if min(self.block_shape) < 1:
            raise ValueError(f"KV layout: every size must be positive: {self}")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"KV layout: unknown dtype {self.dtype!r}")

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """(layers, 2, block_tokens, kv_heads, head_dim)."""
        return (self.layers, 2, self.block_tokens, self.kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, without its header."""
        return self.block_tokens * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * np.dtype(self.dtype).itemsize


@lru_cache(maxsize=256)
def namespace(fingerprint: str, layout: KvLayout, tenant: str) -> bytes:
    """What separates chains that must never share a block: format version, weights, layout with its dtype, tenant.

    JSON, because it quotes: no fingerprint can be chosen so that it runs over into the tenant's field.
    """
    return json.dumps([FORMAT_VERSION, fingerprint, asdict(layout), tenant], sort_keys=True).encode()


def block_keys(
    namespace: bytes,
    tokens: npt.NDArray[np.integer],
    block_tokens: int,
    owner: bytes = NO_OWNER,
    *,
    template_tokens: int = 0,
) -> list[bytes]:
    """The key of every whole block of a prompt, [P // block_tokens] of KEY_BYTES bytes each; equal in every process.

    tokens: int64 [P]. key_i = tag_i, h_i; h_i = H(tag_i, h_{i-1}, tokens of block i); h_-1 = H(namespace). A partial last block
    has no key. tag_i: nobody's where block i ends within the first `template_tokens`, which say nothing of a user, else owner.
    owner: the tag of a stored user, OWNER_BYTES; users with tags share no other block. Raises ValueError for another length.
    """
    if len(owner) != OWNER_BYTES:
        raise ValueError(f"KV: an owner's tag has {OWNER_BYTES} bytes, not {len(owner)}")
    wire = np.ascontiguousarray(tokens, dtype="<i8").tobytes()
    step = block_tokens * 8
    size = KEY_BYTES - OWNER_BYTES
    link = hashlib.blake2b(namespace, digest_size=size, person=b"atspeed-kv-root").digest()
    keys = []
    for block in range(len(wire) // step):
        tag = NO_OWNER if (block + 1) * block_tokens <= template_tokens else owner
        message = tag + link + wire[block * step : (block + 1) * step]
        link = hashlib.blake2b(message, digest_size=size, person=b"atspeed-kv-block").digest()
        keys.append(tag + link)
    return keys


def owner_of(key: bytes) -> bytes:
    """The tag of the user whose block it is; NO_OWNER where it is nobody's."""
    return key[:OWNER_BYTES]


def is_shared_prefix_key(keys: Sequence[bytes]) -> int:
    """How many of a chain's keys are nobody's: those come first."""
    return sum(owner_of(key) == NO_OWNER for key in keys)


def encode_block(layout: KvLayout, key: bytes, block: KvArray) -> bytes:
    """A block as bytes: identity (magic, format version, dtype, shape, key), CRC-32 of the payload, the payload.

    Little-endian, row-major. Raises ValueError when the block or the key is not one of this layout.
    """
    _check_array(layout, block, block_tokens=layout.block_tokens)
    payload = np.ascontiguousarray(block, dtype=_wire_dtype(layout))
    return b"".join((_identity(layout, key), _CHECKSUM.pack(zlib.crc32(payload.data)), _PADDING, payload.data))


def decode_block(layout: KvLayout, key: bytes, data: bytes) -> KvArray | None:
    """The block that `encode_block` wrote for exactly this layout and key, else None: truncated, damaged, foreign.

    The array is a read-only one of its own, which `MemoryKvCache` keeps without another copy. The checksum is there for
    accidents: CRC-32 finds all those within 32 consecutive bits and all but one in 2^32 of the others, for 0.4 ms/MB, less
    than the fetch. It proves no origin; a keyed hash costs four times as much, and whoever can write to this Redis can
    forge histories just as well.
    """
    if len(key) != KEY_BYTES or len(data) != _HEADER_BYTES + layout.block_bytes:
        return None
    if not data.startswith(_identity(layout, key)):
        return None
    payload = memoryview(data)[_HEADER_BYTES:]
    if data[_IDENTITY.size : _HEADER_BYTES] != _CHECKSUM.pack(zlib.crc32(payload)) + _PADDING:
        return None
    block = np.frombuffer(payload, dtype=_wire_dtype(layout)).reshape(layout.block_shape)
    return _read_only_copy(block.astype(layout.dtype, copy=False))


def copy_blocks(layout: KvLayout, kv: KvArray, start: int, stop: int) -> list[KvArray]:
    """The whole blocks `start` .. `stop` - 1 of a prefix [layers, 2, P, kv_heads, head_dim], each a read-only array of its own.

    Copies outside the GIL. Raises ValueError when `kv` is not of this layout or holds fewer tokens.
    """
    step = layout.block_tokens
    _check_array(layout, kv, block_tokens=max(kv.shape[2] if kv.ndim == 5 else 0, stop * step))
    return [_read_only_copy(kv[:, :, block * step : (block + 1) * step]) for block in range(start, stop)]


def _read_only_copy(array: KvArray) -> KvArray:
    copy = np.array(array, order="C")
    copy.flags.writeable = False
    return copy


def _owned(block: KvArray) -> bool:
    """Whether a block is a read-only array of its own, with no other array's memory behind it."""
    return block.base is None and not block.flags.writeable


def _check_array(layout: KvLayout, array: KvArray, *, block_tokens: int) -> None:
    expected = (layout.layers, 2, block_tokens, layout.kv_heads, layout.head_dim)
    if array.shape != expected or array.dtype.name != layout.dtype:
        raise ValueError(f"KV: {array.dtype} {array.shape} where the layout wants {layout.dtype} {expected}")


def _identity(layout: KvLayout, key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"KV: a key has {KEY_BYTES} bytes, not {len(key)}")
    return _IDENTITY.pack(_MAGIC, FORMAT_VERSION, _wire_dtype(layout).str.encode(), *layout.block_shape, key)


def _wire_dtype(layout: KvLayout) -> np.dtype[np.floating]:
    return np.dtype(layout.dtype).newbyteorder("<")


@dataclass(frozen=True)
class CacheStatistics:
    """What a memory tier holds now and has done since it was made. `hits` and `misses` count blocks asked for."""

    blocks: int
    used_bytes: int
    hits: int
    misses: int
    evictions: int


class MemoryKvCache:
    """Blocks by key in memory, least recently used out first, never more than `limit_bytes` of them.

    The contract:

    - Content-addressed: a key stands for one content, so putting a key that is present keeps the block that is there.
    - A block that is a read-only array of its own is kept as it is: who puts it has kept no writable view of it. Any other
      is copied. Blocks are handed out read-only, and one that a caller holds outlives its eviction, unchanged.
    - `used_bytes` is exactly the sum of the blocks' array bytes, and at most `limit_bytes` after every call. Keys and
      bookkeeping, some 300 bytes a block, are not counted. A block beyond the limit is not kept and evicts nothing.
    - A chain is used from its head, so its head is the last to go: for all methods that take a chain, earlier keys count
      as the more recently used. Of a chain too long for the limit, the beginning stays.
    - No call blocks or awaits, or copies a block of its own array. Not thread-safe: call it from the event loop only.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes: {limit_bytes} is negative")
        self.limit_bytes = limit_bytes
        self._blocks: OrderedDict[bytes, KvArray] = OrderedDict()
        self._bytes = 0
        self._hits = self._misses = self._evictions = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks held."""
        return self._bytes

    @property
    def statistics(self) -> CacheStatistics:
        """A snapshot of the counters."""
        return CacheStatistics(len(self._blocks), self._bytes, self._hits, self._misses, self._evictions)

    def get_chain(self, keys: Sequence[bytes]) -> list[KvArray]:
        """The blocks of the longest leading run of `keys` that is present, read-only."""
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
        """Keep the last blocks of a chain: `new` are those of the last `len(new)` of `keys`.

        Returns the read-only blocks that now stand for these keys, whether or not they were kept. Until it returns, the
        tier may hold as much as `new` beyond its limit. Raises ValueError when there are fewer keys than blocks.
        """
        if len(new) > len(keys):
            raise ValueError(f"memory KV: {len(new)} blocks for a chain of {len(keys)}")
        last = keys[len(keys) - len(new) :]
        stored = [self._insert(key, block) for key, block in zip(last, new, strict=True)]
        # Before the eviction, so that it takes the end of this chain and not its head.
        self.touch(keys)
        self._evict()
        return stored

    def touch(self, keys: Iterable[bytes]) -> None:
        """Make those of `keys` that are present the most recently used, the first of them last to go."""
        for key in reversed(list(keys)):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def drop(self, unwanted: Callable[[bytes], bool]) -> int:
        """Let go of every block whose key is unwanted. Looks at all keys; returns how many went."""
        gone = [key for key in self._blocks if unwanted(key)]
        for key in gone:
            self._bytes -= self._blocks.pop(key).nbytes
        return len(gone)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the accounting is exact, the limit kept and every block immutable."""
        held = sum(block.nbytes for block in self._blocks.values())
        if held != self._bytes:
            raise RuntimeError(f"memory KV: {held} bytes held, {self._bytes} accounted for")
        if held > self.limit_bytes:
            raise RuntimeError(f"memory KV: {held} bytes held, the limit is {self.limit_bytes}")
        for key, block in self._blocks.items():
            if not _owned(block):
                raise RuntimeError(f"memory KV: block {key.hex()} is not a read-only array of its own")

    def _insert(self, key: bytes, block: KvArray) -> KvArray:
        present = self._blocks.get(key)
        if present is not None:
            return present
        own = block if _owned(block) else _read_only_copy(block)
        if own.nbytes <= self.limit_bytes:
            self._blocks[key] = own
            self._bytes += own.nbytes
        return own

    def _evict(self) -> None:
        while self._bytes > self.limit_bytes:
            _, block = self._blocks.popitem(last=False)
            self._bytes -= block.nbytes
            self._evictions += 1
