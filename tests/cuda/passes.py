"""Passes whose calls of CUDA are counted, and the placement of a graph's nodes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from atspeed.engine.model import decoder as decoder_module
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder
from atspeed.engine.model.device_pass import PagedInput
from atspeed.engine.model.token_tree import PathPass
from tests.cuda.dry_run import Counts, counted
from tests.cuda.shapes import PAGE


def tree_pass(decoder: Decoder, cached: int, new: int, batch: int = 1) -> None:
    """Make one pass over `batch` trees of `new` tokens, each behind `cached` tokens in host memory."""
    kv = np.zeros((decoder.layers, 2, batch, cached + new, decoder.kv_heads, decoder.head_dim), decoder.dtype)
    visible = np.concatenate([np.ones((new, cached), bool), np.eye(new, dtype=bool)], axis=1)
    decoder.run_batch(
        np.full((batch, new), 5),
        np.full((batch, new), cached),
        np.broadcast_to(visible, (batch, *visible.shape)),
        np.ascontiguousarray(kv[:, :, :, :cached]),
        np.arange(batch * new),
        np.ascontiguousarray(kv[:, :, :, cached:]),
    )


def counted_pass(decoder: Decoder, cached: int, new: int, batch: int = 1) -> Counts:
    """Count the calls of such a pass, the second of its kind: the first one allocates."""
    return second(lambda: tree_pass(decoder, cached, new, batch))


def paged_inputs(decoder: DeviceDecoder, trees: Sequence[tuple[int, int]], depth: int = 3) -> list[PagedInput]:
    """Inputs of trees of (cached, new) tokens in pages of their own; new tokens are siblings."""
    inputs, first = [], 0
    for cached, new in trees:
        pages = -(-(cached + new) // PAGE)
        prefix, ancestors = np.full(new, max(cached, 1)), np.zeros((new, depth), np.int32)
        step = PathPass(np.full(new, 5), np.full(new, cached), np.arange(new), prefix, ancestors)
        inputs.append(PagedInput(step, decoder.slots(range(first, first + pages), cached + new)))
        first += pages
    return inputs


def counted_paged(decoder: DeviceDecoder, *trees: tuple[int, int]) -> Counts:
    """Count the calls of a pass over trees of (cached, new) tokens, the second of its kind."""
    inputs = paged_inputs(decoder, trees)
    return second(lambda: decoder.run(inputs))


def second(call: Callable[[], object]) -> Counts:
    """Count the calls of CUDA that a second call makes."""
    call()
    with counted() as made:
        call()
    return made


@contextmanager
def profiled(prefix: Path) -> Iterator[None]:
    """Sessions that are opened in the block write a profile when `placement` asks for it."""
    plain = decoder_module._session_options

    def options(runtime: RuntimeOptions) -> Any:
        settings = plain(runtime)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(prefix)
        return settings

    with patch.object(decoder_module, "_session_options", options):
        yield


def placement(session: Any) -> Counter[tuple[str, str]]:
    """Return the number of runs of nodes by (provider, operator), since the session was opened within `profiled`."""
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event["args"] for event in events if event["cat"] == "Node" and "provider" in event["args"]]
    return Counter((node["provider"].removesuffix("ExecutionProvider"), node["op_name"]) for node in nodes)
