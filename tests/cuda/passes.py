"""Passes whose calls of CUDA are counted, and the placement of a graph's nodes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from atspeed.engine.model import decoder as decoder_module
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from tests.cuda.dry_run import Counts, counted


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

    with (
        patch.object(decoder_module, "_session_options", options),
        patch("tests.cuda.shapes._session_options", options),
    ):
        yield


def placement(session: Any) -> Counter[tuple[str, str]]:
    """Return the number of runs of nodes by (provider, operator), since the session was opened within `profiled`."""
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event["args"] for event in events if event["cat"] == "Node" and "provider" in event["args"]]
    return Counter((node["provider"].removesuffix("ExecutionProvider"), node["op_name"]) for node in nodes)
