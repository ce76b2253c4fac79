"""Counter-based randomness: noise is a pure function of (seed, stream, key), never of the order of calls.

So the draft and the target perturb the same path alike in two processes, and a request is reproducible by its seed.
The mixer is SplitMix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np

from atspeed.engine.arrays import Float64, UInt64


class Stream(IntEnum):
    """Independent uses of one seed."""

    GUMBEL = 1  # exact sampling: the perturbation of a path (Kool et al. 2019)
    PROPOSAL = 2  # relaxed sampling: the draft's draw at a level
    ACCEPT = 3  # relaxed sampling: u_j of the acceptance test
    RESIDUAL = 5  # relaxed sampling: draws from the residual, and from p


def mix64(value: UInt64) -> UInt64:
    """SplitMix64's finaliser, elementwise: a bijection of 64-bit words that looks random."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniform(seed: int, stream: Stream, keys: UInt64) -> Float64:
    """Uniform in (0, 1), one per key [n]: 52 random bits and a half, which float64 holds exactly; never 0 and never 1."""
    bits = mix64(mix64(keys ^ _salt(seed, stream))) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


@lru_cache(maxsize=256)
def _salt(seed: int, stream: Stream) -> np.uint64:
    words = np.asarray([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64), np.asarray([stream], dtype=np.uint64)
    return np.uint64(mix64(words[0] ^ mix64(words[1]))[0])


def gumbel(seed: int, stream: Stream, keys: UInt64) -> Float64:
    """Standard Gumbel noise, one per key [n]: the arg max of log-weights plus this is a draw by weight."""
    return -np.log(-np.log(uniform(seed, stream, keys)))
