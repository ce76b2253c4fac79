"""What a model's passes take by themselves, on any provider: against their tokens, and beside one read of its weights.

With one user a pass on a GPU takes about as long as reading the weights, up to some hundred tokens. How long a read takes is
measured too: a copy of a large buffer on the same device reads and writes each byte once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from atspeed.engine.arrays import KvArray
from atspeed.engine.model.decoder import Decoder, Provider
from atspeed.training.inflation import ModelShape

_COPIED_BYTES = 2**28
_COPIES = 10


@dataclass(frozen=True)
class PassRow:
    """Passes of so many new tokens on so many cached ones. read_ms: one read of what a pass reads of the weights."""

    model: str
    new_tokens: int
    cached_tokens: int
    p50_ms: float
    read_ms: float
    times_read: float


@dataclass(frozen=True)
class BeamsRow:
    """A whole search's passes without choosing anything: `codes` levels of `beams` beams behind a prompt.

    level_by_level_ms: a pass per level, the prompt in the first. at_once_ms: one pass of prompt and all drafted beams.
    """

    model: str
    prompt_tokens: int
    beams: int
    codes: int
    level_by_level_ms: float
    at_once_ms: float


def bytes_read(shape: ModelShape, vocab_size: int, bytes_per_weight: int) -> int:
    """Of the weights, in one pass: all but the embedding, of which it reads some rows."""
    projections = 2 * shape.head_dim * (shape.heads + shape.kv_heads) + 3 * shape.intermediate
    return bytes_per_weight * shape.hidden * (shape.layers * projections + vocab_size)


def bytes_per_second(provider: Provider) -> float:
    """How fast the device reads while it writes as much, twice counted: what a copy moves."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=provider)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if provider == "cuda":
            torch.cuda.synchronize()

    return 2e3 * _COPIED_BYTES / _median_ms(copy, _COPIES)


def probe_passes(
    name: str,
    decoder: Decoder,
    vocab_size: int,
    read_ms: float,
    *,
    new: Sequence[int],
    cached: Sequence[int],
    repeats: int,
) -> list[PassRow]:
    """Every number of new tokens on every number of cached ones. The new ones are siblings, as beams are."""
    rows = []
    for behind in cached:
        tree = _Tree(decoder, vocab_size, behind, [*range(-1, behind - 1), *[behind - 1] * max(new)])
        for count in new:
            p50 = _median_ms(partial(tree.run, behind, behind + count), repeats)
            rows.append(PassRow(name, count, behind, round(p50, 3), round(read_ms, 3), round(p50 / read_ms, 3)))
    return rows


def probe_beams(
    name: str, decoder: Decoder, vocab_size: int, *, prompt: int, beams: int, codes: int, repeats: int
) -> BeamsRow:
    """A prompt, then codes - 1 levels of beams, each the child of one beam of the level above."""
    parents = [*range(-1, prompt - 1)]
    for level in range(codes - 1):
        parents += [prompt - 1] * beams if level == 0 else range(len(parents) - beams, len(parents))
    tree = _Tree(decoder, vocab_size, prompt, parents)
    ends = range(prompt, len(parents) + 1, beams)

    def level_by_level() -> None:
        for start, end in pairwise([0, *ends]):
            tree.run(start, end)

    at_once = partial(tree.run, 0, len(parents))
    times = [round(_median_ms(run, repeats), 3) for run in (level_by_level, at_once)]
    return BeamsRow(name, prompt, beams, codes, *times)


class _Tree:
    """A token tree of random tokens, and of keys and values that no pass has to have computed.

    prompt: how many of its tokens are a chain. parents: of every token, -1 for the first.
    """

    def __init__(self, decoder: Decoder, vocab_size: int, prompt: int, parents: Sequence[int]) -> None:
        random = np.random.default_rng(len(parents))
        self._decoder = decoder
        self._tokens = random.integers(0, vocab_size, len(parents))
        self._visible = np.eye(len(parents), dtype=bool)
        for token, parent in enumerate(parents):
            if parent >= 0:
                self._visible[token] |= self._visible[parent]
        self._positions = self._visible.sum(axis=1) - 1
        # A prompt's logits are wanted at its end alone, those of beams at every one.
        self._first_row = prompt - 1
        self._kv: KvArray = decoder.empty_kv(len(parents))
        self._kv[:] = random.standard_normal(self._kv.shape[1:]) * 0.1

    def run(self, start: int, end: int) -> None:
        """A pass over these tokens, on all before them."""
        rows = np.arange(max(start, self._first_row), end) - start
        past, new = self._kv[:, :, :start], self._kv[:, :, start:end]
        span = slice(start, end)
        self._decoder.run(self._tokens[span], self._positions[span], self._visible[span, :end], past, rows, new)


def _median_ms(run: Callable[[], None], repeats: int) -> float:
    """After one run that does not count."""
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(times))
