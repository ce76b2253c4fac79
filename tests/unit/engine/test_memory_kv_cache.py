"""The memory tier of prefix KV keeps its promises: beside a naive cache, and one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.memory_cache import MemoryKvCache


class NaiveCache:
    """The contract of MemoryKvCache in the plainest way: a list, least recently used first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.entries: list[tuple[int, int]] = []
        self.evictions = 0

    @property
    def used(self) -> int:
        return sum(size for _, size in self.entries)

    def present(self, name: int) -> bool:
        return any(entry[0] == name for entry in self.entries)

    def touch(self, names: list[int]) -> None:
        for name in names[::-1]:
            self.entries.sort(key=lambda entry: entry[0] == name)

    def get_chain(self, names: list[int]) -> list[int]:
        absent = [index for index, name in enumerate(names) if not self.present(name)]
        run = names[: absent[0] if absent else len(names)]
        self.touch(run)
        return run

    def put_chain(self, names: list[int], new: int) -> None:
        for name in names[len(names) - new :]:
            if not self.present(name) and tiny(name).nbytes <= self.limit:
                self.entries.append((name, tiny(name).nbytes))
        self.touch(names)
        while self.used > self.limit:
            self.entries.pop(0)
            self.evictions += 1


def tiny(name: int) -> KvArray:
    """A block of a size that depends on its name, 8 to 40 bytes, and holds its name."""
    return np.full((1, 2, name % 5 + 1, 1, 1), name, dtype=np.float32)


def put(cache: MemoryKvCache, key: bytes, block: KvArray) -> KvArray:
    """A chain of one."""
    (kept,) = cache.put_chain([key], [block])
    return kept


def key_of(name: int) -> bytes:
    return bytes([name])


names = st.integers(0, 11)
operations = st.lists(
    st.tuples(st.sampled_from(["put", "put", "get", "touch"]), st.lists(names, max_size=5, unique=True)),
    max_size=60,
)


class TestMemory:
    @given(st.integers(0, 150), operations)
    def test_behaves_as_the_naive_cache(self, limit: int, script: list[tuple[str, list[int]]]) -> None:
        cache, naive = MemoryKvCache(limit), NaiveCache(limit)
        for operation, arguments in script:
            chain = [key_of(name) for name in arguments]
            if operation == "put":
                new = len(chain) // 2 + 1 if chain else 0
                stored = cache.put_chain(chain, [tiny(name) for name in arguments[len(chain) - new :]])
                assert [int(block.flat[0]) for block in stored] == arguments[len(chain) - new :]
                naive.put_chain(arguments, new)
            elif operation == "touch":
                cache.touch(chain)
                naive.touch(arguments)
            else:
                found = cache.get_chain(chain)
                assert [int(block.flat[0]) for block in found] == naive.get_chain(arguments)
            cache.check_integrity()
            assert [name for name in range(12) if key_of(name) in cache] == sorted(entry[0] for entry in naive.entries)
        statistics = cache.statistics
        assert (statistics.used_bytes, statistics.blocks) == (naive.used, len(naive.entries))
        assert statistics.evictions == naive.evictions

    def test_immutable_block_is_kept_without_a_copy(self) -> None:
        cache, block = MemoryKvCache(1000), tiny(3)
        block.flags.writeable = False
        assert put(cache, b"k", block) is block
        cache.check_integrity()

    def test_a_read_only_view_is_copied(self) -> None:
        """The array below a view could change it, and all memory of that array would stay."""
        cache, source = MemoryKvCache(1000), tiny(3)
        view = source[:]
        view.flags.writeable = False
        put(cache, b"k", view)
        cache.check_integrity()
        source[:] = 0
        assert (cache.get_chain([b"k"])[0] == 3).all()

    def test_refuses_more_blocks_than_keys(self) -> None:
        cache = MemoryKvCache(1000)
        with pytest.raises(ValueError, match="2 blocks for a chain of 1"):
            cache.put_chain([b"k"], [tiny(0), tiny(0)])
        assert len(cache) == 0

    def test_writable_blocks_are_copied_and_copies_are_immutable(self) -> None:
        cache, source = MemoryKvCache(1000), tiny(3)
        stored = put(cache, b"k", source)
        source[:] = 0
        (found,) = cache.get_chain([b"k"])
        assert found is stored
        assert (found == 3).all()
        with pytest.raises(ValueError, match="read-only"):
            found[:] = 0

    def test_a_block_outlives_its_eviction(self) -> None:
        cache = MemoryKvCache(tiny(4).nbytes)
        held = put(cache, b"old", tiny(4))
        put(cache, b"new", tiny(9))
        assert b"old" not in cache
        assert (held == 4).all()

    def test_block_beyond_the_limit_evicts_nothing(self) -> None:
        cache = MemoryKvCache(tiny(0).nbytes)
        put(cache, b"small", tiny(0))
        assert (put(cache, b"large", tiny(4)) == 4).all()
        assert b"small" in cache
        assert len(cache) == 1

    def test_the_first_block_for_a_key_stays(self) -> None:
        cache = MemoryKvCache(1000)
        first = put(cache, b"k", tiny(1))
        assert put(cache, b"k", tiny(2)) is first
        assert cache.used_bytes == first.nbytes

    def test_end_of_a_chain_is_evicted_before_its_head(self) -> None:
        cache = MemoryKvCache(3 * tiny(0).nbytes)
        chain = [b"a", b"b", b"c"]
        for key in chain:
            put(cache, key, tiny(0))
        cache.get_chain(chain)
        put(cache, b"x", tiny(0))
        assert len(cache.get_chain(chain)) == 2

    def test_counts_blocks_hit_and_missed(self) -> None:
        cache = MemoryKvCache(1000)
        put(cache, b"a", tiny(0))
        cache.get_chain([b"a", b"b", b"c"])
        assert (cache.statistics.hits, cache.statistics.misses) == (1, 2)

    def test_a_limit_of_zero_keeps_nothing(self) -> None:
        cache = MemoryKvCache(0)
        put(cache, b"a", tiny(0))
        assert cache.get_chain([b"a"]) == []
        cache.check_integrity()

    def test_refuses_a_negative_limit(self) -> None:
        with pytest.raises(ValueError, match="negative"):
            MemoryKvCache(-1)


class TestIntegrityCheck:
    @pytest.fixture
    def cache(self) -> MemoryKvCache:
        cache = MemoryKvCache(1000)
        put(cache, b"a", tiny(0))
        cache.check_integrity()
        return cache

    def test_check_integrity_finds_wrong_accounting(self, cache: MemoryKvCache) -> None:
        cache._bytes += 1
        with pytest.raises(RuntimeError, match="accounted"):
            cache.check_integrity()

    def test_check_integrity_finds_an_exceeded_limit(self, cache: MemoryKvCache) -> None:
        cache.limit_bytes = 1
        with pytest.raises(RuntimeError, match="limit"):
            cache.check_integrity()

    def test_check_integrity_finds_a_writable_block(self, cache: MemoryKvCache) -> None:
        cache._blocks[b"a"].flags.writeable = True
        with pytest.raises(RuntimeError, match="read-only"):
            cache.check_integrity()
