"""The hash noise: is it uniform, independent, and the same in every process?

Seeds and statistics are fixed; a p-value below 0.01 in any of them would be a finding, not bad luck of the day.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.arrays import Float64, UInt64
from atspeed.engine.search.sampling import Stream, gumbel, mix64, uniform
from tests.oracles.statistics import uniform_cells_p, uniform_p

MASK = 0xFFFFFFFFFFFFFFFF
KEYS = mix64(np.arange(20_000, dtype=np.uint64))
SIGNIFICANT = 0.01


def unmix64(word: int) -> int:
    """The inverse of `mix64`, on Python integers."""
    word = _unshift(word, 31) * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    word = _unshift(word, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    return (_unshift(word, 30) - 0x9E3779B97F4A7C15) & MASK


def _unshift(word: int, bits: int) -> int:
    result = word
    for _ in range(64 // bits):
        result = word ^ (result >> bits)
    return result


def key_of(bits: int, seed: int, stream: Stream) -> UInt64:
    """The key whose 64 random bits are these, [1]."""
    salt = mix64(np.array([seed], dtype=np.uint64) ^ mix64(np.array([stream], dtype=np.uint64)))
    return np.array([unmix64(unmix64(bits))], dtype=np.uint64) ^ salt


def test_mix64_is_splitmix64() -> None:
    """The reference implementation's first outputs for seed 1234567: state + golden ratio, then the finaliser."""
    states = np.array([(1234567 + n * 0x9E3779B97F4A7C15) & MASK for n in range(3)], dtype=np.uint64)
    assert mix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=20))
def test_mix64_is_a_bijection(words: list[int]) -> None:
    mixed = mix64(np.array(words, dtype=np.uint64)).tolist()
    assert [unmix64(word) for word in mixed] == words


@pytest.mark.parametrize("bits", [0, 1, MASK >> 1, MASK - 1, MASK])
def test_noise_is_finite_at_both_ends(bits: int) -> None:
    """With 53 bits and a half, the largest value was rounded to 1, and its Gumbel noise was infinite."""
    key = key_of(bits, seed=7, stream=Stream.GUMBEL)
    (value,) = uniform(7, Stream.GUMBEL, key)
    assert 0 < value < 1
    assert value == pytest.approx(bits / 2**64, abs=2e-16)
    assert np.isfinite(gumbel(7, Stream.GUMBEL, key)).all()


@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -1])
def test_noise_is_uniform_over_keys(stream: Stream, seed: int) -> None:
    noise = uniform(seed, stream, KEYS)
    assert uniform_p(noise) > SIGNIFICANT / 20
    assert uniform_p(np.exp(-np.exp(-gumbel(seed, stream, KEYS)))) > SIGNIFICANT / 20
    cells = np.bincount((noise * 64).astype(int), minlength=64)
    assert uniform_cells_p(cells) > SIGNIFICANT / 20  # 20 cases in this test: Bonferroni


@pytest.mark.parametrize("step", [1, 2**32, 2**63 // 5000])
def test_noise_of_one_key_is_uniform_over_seeds(step: int) -> None:
    """Neighbouring seeds are what people send: 0, 1, 2 ..."""
    noise = np.concatenate([uniform(seed * step, Stream.GUMBEL, KEYS[:1]) for seed in range(5000)])
    assert uniform_p(noise) > SIGNIFICANT / 3


def test_keys_that_differ_in_one_bit_are_independent() -> None:
    low, high = uniform(3, Stream.GUMBEL, KEYS), uniform(3, Stream.GUMBEL, KEYS ^ np.uint64(1))
    assert _independence_p(low, high) > SIGNIFICANT


@pytest.mark.parametrize("first", Stream)
@pytest.mark.parametrize("second", Stream)
def test_streams_and_seeds_are_independent(first: Stream, second: Stream) -> None:
    """Another stream of one seed, and every stream of the next seed, by a chi-square over an 8 x 8 grid."""
    if first != second:
        assert _independence_p(uniform(5, first, KEYS), uniform(5, second, KEYS)) > SIGNIFICANT / 50
    assert _independence_p(uniform(5, first, KEYS), uniform(6, second, KEYS)) > SIGNIFICANT / 50


def _independence_p(first: Float64, second: Float64) -> float:
    table, *_ = np.histogram2d(first, second, bins=8, range=[[0, 1], [0, 1]])
    return uniform_cells_p(table.astype(np.int64))


def test_noise_does_not_depend_on_what_is_asked_with_it() -> None:
    whole = gumbel(9, Stream.RESIDUAL, KEYS)
    assert np.array_equal(whole[::-7], gumbel(9, Stream.RESIDUAL, KEYS[::-7]))
    assert np.array_equal(whole[:1], gumbel(9, Stream.RESIDUAL, KEYS[:1]))
