"""Prefix KV in blocks: keys that never meet, bytes that are never misread."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.memory_cache import (
    KEY_BYTES,
    NO_USER_KEY,
    USER_KEY_BYTES,
    KvLayout,
    MemoryKvCache,
    block_keys,
    copy_blocks,
    decode_block,
    encode_block,
    namespace,
    user_key_of,
)

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=2, dtype="float32", block_tokens=2)
KEY = bytes(range(KEY_BYTES))

sizes = st.integers(1, 4)
layouts = st.builds(KvLayout, sizes, sizes, sizes, st.sampled_from(["float32", "float16"]), sizes)
keys = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)


def random_block(layout: KvLayout, seed: int = 0) -> KvArray:
    """A block of arbitrary bit patterns, NaNs and infinities included."""
    raw = np.random.default_rng(seed).bytes(layout.block_bytes)
    return np.frombuffer(raw, dtype=layout.dtype).reshape(layout.block_shape)


def same_bits(left: KvArray, right: KvArray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


class TestLayout:
    def test_sizes(self) -> None:
        layout = KvLayout(layers=12, kv_heads=4, head_dim=64, dtype="float16", block_tokens=16)
        assert layout.block_shape == (12, 2, 16, 4, 64)
        assert layout.bytes_per_token == 12 * 2 * 4 * 64 * 2
        assert layout.block_bytes == 16 * layout.bytes_per_token

    @pytest.mark.parametrize("name", ["layers", "kv_heads", "head_dim", "block_tokens"])
    def test_refuses_empty_sizes(self, name: str) -> None:
        with pytest.raises(ValueError, match="positive"):
            replace(LAYOUT, **{name: 0})  # type: ignore[arg-type]

    def test_refuses_other_dtypes(self) -> None:
        with pytest.raises(ValueError, match="float64"):
            replace(LAYOUT, dtype="float64")  # type: ignore[arg-type]


class TestKeys:
    @given(st.lists(st.integers(0, 2**40), max_size=40), st.lists(st.integers(0, 9), max_size=9), sizes)
    def test_a_longer_prompt_keeps_the_keys_of_its_beginning(
        self, prompt: list[int], more: list[int], step: int
    ) -> None:
        short = block_keys(b"n", np.asarray(prompt, dtype=np.int64), step)
        longer = block_keys(b"n", np.asarray(prompt + more, dtype=np.int64), step)
        assert len(short) == len(prompt) // step
        assert longer[: len(short)] == short
        assert {len(key) for key in longer} <= {KEY_BYTES}

    def test_a_key_covers_every_token_before_it(self) -> None:
        tokens = np.arange(64, dtype=np.int64)
        original = block_keys(b"n", tokens, 8)
        for position in range(64):
            changed = tokens.copy()
            changed[position] += 1
            other = block_keys(b"n", changed, 8)
            assert [a == b for a, b in zip(original, other, strict=True)] == [
                block < position // 8 for block in range(8)
            ]

    def test_the_token_array_may_have_any_integer_type_and_stride(self) -> None:
        tokens = np.arange(32, dtype=np.int64)
        expected = block_keys(b"n", tokens, 4)
        assert block_keys(b"n", tokens.astype(np.int32), 4) == expected
        assert block_keys(b"n", tokens.astype(">i8"), 4) == expected
        assert block_keys(b"n", np.repeat(tokens, 2)[::2], 4) == expected

    def test_ten_thousand_different_prefixes_have_different_keys(self) -> None:
        """Every variation of weights, dtype, layout, tenant, user or tokens; names are made to run over into each other."""
        rng = random.Random(1)
        names = ["", '"', '","', ", ", "a", "a,", ",a", "\\", '\\"', "null", "\x00", "é", "\ud800"]
        seen: dict[bytes, tuple[object, ...]] = {}
        while len(seen) < 10_000:
            fingerprint, tenant = ("".join(rng.choices(names, k=2)) for _ in range(2))
            layout = KvLayout(
                layers=rng.randint(1, 3),
                kv_heads=rng.randint(1, 3),
                head_dim=rng.randint(1, 3),
                dtype="float16" if rng.random() < 0.5 else "float32",
                block_tokens=rng.randint(1, 3),
            )
            tokens = tuple(rng.choices(range(3), k=layout.block_tokens))
            user_key = rng.choice([NO_USER_KEY, b"a" * USER_KEY_BYTES, b"b" * USER_KEY_BYTES])
            (key,) = block_keys(
                namespace(fingerprint, layout, tenant),
                np.asarray(tokens, dtype=np.int64),
                layout.block_tokens,
                user_key,
            )
            assert user_key_of(key) == user_key
            origin = (fingerprint, layout, tenant, user_key, tokens)
            assert seen.setdefault(key, origin) == origin

    def test_ten_thousand_changed_contexts_never_share_blocks(self) -> None:
        """0 cross-hits in one cache between worlds that differ in weights, dtype, tokenizer, catalogue, tenant or user.

        Tokenizer and catalogue have no field in a key: they decide which tokens a history becomes, and equal tokens under
        equal weights have equal keys and values. So a hit is right where these two are equal, and wrong anywhere else.
        """
        rng = random.Random(2)
        cache, step, items, levels = MemoryKvCache(10**7), 2, 5, 2
        written: dict[bytes, tuple[object, ...]] = {}
        hits = 0
        for _ in range(10_000):
            codes = [[rng.randrange(2) for _ in range(levels)] for _ in range(items)]
            spelling = rng.sample(range(3, 9), 4)
            prompt = [1] + [spelling[2 * level + code] for item in (0, 1) for level, code in enumerate(codes[item])]
            weights, tenant = rng.choice(["w1", "w2"]), rng.choice(["", "t"])
            layout = replace(LAYOUT, dtype=rng.choice(["float32", "float16"]))
            user_key = rng.choice([NO_USER_KEY, b"a" * USER_KEY_BYTES])
            keys = block_keys(namespace(weights, layout, tenant), np.array(prompt), step, user_key)
            for index, block in enumerate(cache.get_chain(keys)):
                origin = (weights, layout, tenant, user_key, tuple(prompt[: (index + 1) * step]))
                assert written[keys[index]] == origin
                assert block.dtype == layout.dtype
                hits += 1
            cache.put_chain(keys, [np.zeros(layout.block_shape, dtype=layout.dtype)] * len(keys))
            for index, key in enumerate(keys):
                origin = (weights, layout, tenant, user_key, tuple(prompt[: (index + 1) * step]))
                assert written.setdefault(key, origin) == origin
        assert 0 < hits < 20_000

    @pytest.mark.parametrize("user_key", [b"", b"short", b"much too long"])
    def test_user_key_of_another_length_is_refused(self, user_key: bytes) -> None:
        with pytest.raises(ValueError, match="8 bytes"):
            block_keys(b"n", np.arange(4), 2, user_key)

    @given(st.integers(0, 20), st.integers(1, 5), st.integers(0, 20))
    def test_blocks_within_the_template_belong_to_the_shared_prefix(
        self, tokens: int, step: int, template: int
    ) -> None:
        """Blocks behind it differ too: also the block across the border, whose first words are the template's."""
        prompt = np.arange(tokens)
        shared = block_keys(b"n", prompt, step)
        first, second = (
            block_keys(b"n", prompt, step, user_key, template_tokens=template) for user_key in (b"a" * 8, b"b" * 8)
        )
        common = min(template, tokens) // step
        assert first[:common] == second[:common] == shared[:common]
        assert {user_key_of(key) for key in first[common:]} <= {b"a" * 8}
        assert not set(first[common:]) & {*second[common:], *shared}
        links = [{key[USER_KEY_BYTES:] for key in keys[common:]} for keys in (first, second, shared)]
        assert not links[0] & (links[1] | links[2]), "equal histories show"

    def test_a_root_is_never_a_block(self) -> None:
        """No chosen namespace has a chain that continues another's."""
        tokens = np.arange(12, dtype=np.int64)
        first, second, third = block_keys(b"n", tokens, 4)
        assert second not in block_keys(first, tokens[4:], 4)
        assert third not in block_keys(first + tokens[4:8].tobytes(), tokens[8:], 4)

    def test_equal_in_another_release(self) -> None:
        """Pinned. A change here misreads nothing, but empties every cache in use: raise FORMAT_VERSION knowingly."""
        last = block_keys(namespace("weights", LAYOUT, "tenant"), np.arange(6), 2)[-1]
        assert last.hex() == "0000000000000000a151dc52f8c8c344de76cc402989aa12d2b2df01e3ad1e25"


class TestCodec:
    @given(layouts, keys, st.integers(0, 2**32))
    def test_round_trip_is_exact_and_read_only(self, layout: KvLayout, key: bytes, seed: int) -> None:
        block = random_block(layout, seed)
        decoded = decode_block(layout, key, encode_block(layout, key, block))
        assert decoded is not None
        assert same_bits(decoded, block)
        assert decoded.base is None
        assert not decoded.flags.writeable

    def test_the_bytes_do_not_depend_on_memory_order(self) -> None:
        block = random_block(LAYOUT)
        whole = np.concatenate([block, block], axis=2)
        for variant in (np.asfortranarray(block), whole[:, :, 2:], block.astype(block.dtype.newbyteorder())):
            assert encode_block(LAYOUT, KEY, variant) == encode_block(LAYOUT, KEY, block)

    def test_every_single_bit_flip_is_a_miss(self) -> None:
        """All of them: magic, version, dtype, shape, key, checksum, padding and payload."""
        data = encode_block(LAYOUT, KEY, random_block(LAYOUT))
        for position, bit in product(range(len(data)), range(8)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            assert decode_block(LAYOUT, KEY, bytes(damaged)) is None, (position, bit)

    def test_every_truncation_and_extension_is_a_miss(self) -> None:
        data = encode_block(LAYOUT, KEY, random_block(LAYOUT))
        for length in range(len(data)):
            assert decode_block(LAYOUT, KEY, data[:length]) is None
            assert decode_block(LAYOUT, KEY, data[length:] + data[:length]) is None or length == 0
        assert decode_block(LAYOUT, KEY, data + b"\0") is None

    @given(layouts, st.integers(0, 2**32), st.data())
    def test_overwritten_ranges_are_misses(self, layout: KvLayout, seed: int, data: st.DataObject) -> None:
        good = encode_block(layout, KEY, random_block(layout, seed))
        start = data.draw(st.integers(0, len(good) - 1))
        noise = data.draw(st.binary(min_size=1, max_size=len(good) - start))
        bad = good[:start] + noise + good[start + len(noise) :]
        assert (decode_block(layout, KEY, bad) is None) == (bad != good)

    @given(st.binary(max_size=400))
    def test_arbitrary_bytes_are_misses(self, data: bytes) -> None:
        assert decode_block(LAYOUT, KEY, data) is None

    @given(layouts, layouts, keys, keys)
    def test_only_its_own_key_and_layout_read_a_block(
        self, layout: KvLayout, other: KvLayout, key: bytes, other_key: bytes
    ) -> None:
        data = encode_block(layout, key, random_block(layout))
        assert (decode_block(layout, other_key, data) is None) == (other_key != key)
        assert (decode_block(other, key, data) is None) == (other != layout)

    @given(st.binary(max_size=KEY_BYTES + 2))
    def test_a_malformed_key_reads_nothing(self, key: bytes) -> None:
        data = encode_block(LAYOUT, KEY, random_block(LAYOUT))
        assert (decode_block(LAYOUT, key, data) is None) == (key != KEY)

    def test_layouts_of_equal_size_do_not_read_each_other(self) -> None:
        """Same number of bytes, transposed axes or another dtype: only the header tells them apart."""
        layout = KvLayout(layers=2, kv_heads=4, head_dim=8, dtype="float32", block_tokens=2)
        data = encode_block(layout, KEY, random_block(layout))
        twins = [
            KvLayout(layers=2, kv_heads=8, head_dim=4, dtype="float32", block_tokens=2),
            KvLayout(layers=4, kv_heads=4, head_dim=8, dtype="float32", block_tokens=1),
            KvLayout(layers=2, kv_heads=4, head_dim=8, dtype="float16", block_tokens=4),
        ]
        for twin in twins:
            assert twin.block_bytes == layout.block_bytes
            assert decode_block(twin, KEY, data) is None

    def test_encoding_refuses_another_layout(self) -> None:
        block = random_block(LAYOUT)
        with pytest.raises(ValueError, match="float16"):
            encode_block(LAYOUT, KEY, np.zeros(LAYOUT.block_shape, dtype=np.float16))
        with pytest.raises(ValueError, match="layout has"):
            encode_block(LAYOUT, KEY, block[:1])
        with pytest.raises(ValueError, match="32 bytes"):
            encode_block(LAYOUT, b"short", block)


class TestCopyBlocks:
    def test_blocks_are_the_prefix_in_order(self) -> None:
        kv = np.arange(2 * 2 * 7 * 1 * 2, dtype=np.float32).reshape(2, 2, 7, 1, 2)
        blocks = copy_blocks(LAYOUT, kv, 0, 3)
        assert np.array_equal(np.concatenate(blocks, axis=2), kv[:, :, :6])
        assert np.array_equal(np.concatenate(copy_blocks(LAYOUT, kv, 1, 3), axis=2), kv[:, :, 2:6])
        assert copy_blocks(LAYOUT, kv, 3, 3) == []

    def test_later_changes_of_the_prefix_do_not_reach_the_blocks(self) -> None:
        """The evaluator continues to write into the same buffer."""
        kv = np.zeros((2, 2, 2, 1, 2), dtype=np.float32)
        (block,) = copy_blocks(LAYOUT, kv, 0, 1)
        kv[:] = 1
        assert not block.any()
        with pytest.raises(ValueError, match="read-only"):
            block[:] = 1

    @pytest.mark.parametrize("shape", [(2, 2, 5, 1, 2), (1, 2, 6, 1, 2), (2, 2, 6, 2), (2, 2, 6, 1, 2, 1)])
    def test_copy_refuses_short_prefixes_and_other_layouts(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="layout has"):
            copy_blocks(LAYOUT, np.zeros(shape, dtype=np.float32), 0, 3)
