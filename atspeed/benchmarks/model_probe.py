"""Probe of single passes: time by tokens, and over one read of the weights.

With one user a pass on a GPU takes about as long as a read of the weights, up to some hundred tokens. The time of a read is
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

from atspeed.benchmarks.probe_trees import HostPasses, ProbeTree
from atspeed.engine.model.decoder import Decoder
from atspeed.engine.model.provider import Provider
from atspeed.training.inflation import ModelShape

_COPIED_BYTES = 2**28  # larger than the caches of any device
_COPIES = 10  # of which the median counts


@dataclass(frozen=True)
class PassRow:
    """Passes of new tokens behind cached ones. read_ms: one read of the weights. times_read: p50_ms over read_ms."""

    model: str
    new_tokens: int
    cached_tokens: int
    p50_ms: float
    read_ms: float
    times_read: float


@dataclass(frozen=True)
class BeamsRow:
    """Passes of a whole search, without selection: `codes` levels of `beams` beams behind a prompt.

    Attributes:
        level_by_level_ms: a pass per level, with the prompt in the first.
        at_once_ms: one pass of the prompt and all drafted beams.
    """

    model: str
    prompt_tokens: int
    beams: int
    codes: int
    level_by_level_ms: float
    at_once_ms: float


def bytes_read(shape: ModelShape, vocab_size: int, bytes_per_weight: int) -> int:
    """Return the bytes of weights that a pass reads: all but the embedding, of which it reads some rows."""
    projections = 2 * shape.head_dim * (shape.heads + shape.kv_heads) + 3 * shape.intermediate
    return bytes_per_weight * shape.hidden * (shape.layers * projections + vocab_size)


def bytes_per_second(provider: Provider) -> float:
    """Return the memory bandwidth of the device: bytes read and bytes written by a copy, per second."""
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
    """Measure every number of new tokens behind every number of cached ones. New tokens are siblings, as beams are."""
    rows = []
    for behind in cached:
        tree = HostPasses(decoder, ProbeTree.siblings(vocab_size, behind, max(new)))
        for count in new:
            p50 = _median_ms(partial(tree.run, behind, behind + count), repeats)
            rows.append(PassRow(name, count, behind, round(p50, 3), round(read_ms, 3), round(p50 / read_ms, 3)))
    return rows


def probe_beams(
    name: str, decoder: Decoder, vocab_size: int, *, prompt: int, beams: int, codes: int, repeats: int
) -> BeamsRow:
    """Measure a prompt and codes - 1 levels of beams, each the child of one beam of the level above."""
    parents = [*range(-1, prompt - 1)]
    for level in range(codes - 1):
        parents += [prompt - 1] * beams if level == 0 else range(len(parents) - beams, len(parents))
    tree = HostPasses(decoder, ProbeTree(vocab_size, prompt, parents))
    ends = range(prompt, len(parents) + 1, beams)
    first_row = prompt - 1  # scores are wanted of the prompt's last token and of every beam

    def level_by_level() -> None:
        for start, end in pairwise([0, *ends]):
            tree.run(start, end, first_row=first_row)

    at_once = partial(tree.run, 0, len(parents), first_row=first_row)
    times = [round(_median_ms(run, repeats), 3) for run in (level_by_level, at_once)]
    return BeamsRow(name, prompt, beams, codes, *times)


def _median_ms(run: Callable[[], object], repeats: int) -> float:
    """Return the median time in milliseconds, after one run that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(times))
