"""Small models of several families for the comparison of bits, made in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atspeed.benchmarks.invariance import CheckedModel
from atspeed.benchmarks.made_models import make_model, small_checkpoint
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.training.inflation import ModelShape

# Two layers and two heads: every sum of a graph occurs twice, and a prompt of 4,096 tokens takes a second.
_SHAPE = ModelShape(layers=2, hidden=64, intermediate=128, heads=2, kv_heads=1, head_dim=32, vocab_size=1000)
_CODES = 768  # of the vocabulary
_POSITIONS = 4096 + 64  # a prompt of 4,096 tokens and the nodes below it


def made(family: str, threads: Sequence[int], seed: int) -> CheckedModel:
    """Make a float32 model of a family. seed: seed of its weights."""
    model = make_model(small_checkpoint(family, _SHAPE, seed), "float32", codes=_CODES)
    return CheckedModel(
        architecture=family,
        precision="float32",
        decoders=[model.on_host(RuntimeOptions(intra_op_threads=number)) for number in threads],
        threads=tuple(threads),
        tokens=np.arange(model.vocab_size),
        positions=_POSITIONS,
    )
