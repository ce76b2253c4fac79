"""Comparison of both graphs on a device with the CPU, for small models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from atspeed.benchmarks.gpu_config import GpuConfig
from atspeed.benchmarks.made_models import make_model, small_checkpoint
from atspeed.benchmarks.probe_trees import HostPasses, PagedPasses, ProbeTree
from atspeed.engine.arrays import Float32
from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.training.inflation import ModelShape

_SMALL = ModelShape(layers=3, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocab_size=3000)
_MODELS = {
    "llama": ("llama", _SMALL),
    "llama, a key for every head": ("llama", replace(_SMALL, kv_heads=4)),
    "qwen2": ("qwen2", _SMALL),
    "qwen3": ("qwen3", _SMALL),
}
_LENGTHS = ((37, 27), (37, 26), (40, 1), (200, 56), (201, 56))  # of prompt and nodes: with every remainder of 4
# Largest difference of a log-probability. Chosen, not measured: rounding stays below, and a wrong graph is far above.
_TOLERANCES: dict[Precision, float] = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.8}
_POOL_MB = 32


def correctness(config: GpuConfig) -> Iterator[dict[str, Any]]:
    """Yield a row for each model, number format and graph. `worst` is the largest difference at each length."""
    for label, (family, shape) in _MODELS.items():
        checkpoint = small_checkpoint(family, shape, config.seed)
        trees = [ProbeTree.grown(shape.vocab_size or 0, prompt, nodes) for prompt, nodes in _LENGTHS]
        reference = make_model(checkpoint, "float32").on_host(RuntimeOptions())
        expected = _scores([HostPasses(reference, tree) for tree in trees])
        for precision in get_args(Precision):
            if precision not in _TOLERANCES or (precision == "bfloat16" and config.provider == "cpu"):
                continue  # int8 is for CPUs, which have no bfloat16
            made = make_model(checkpoint, precision)
            paged, host = made.on_device(config.options, _POOL_MB), made.on_host(config.options)
            for graph, passes in (
                ("device", [PagedPasses(paged, tree) for tree in trees]),
                ("host", [HostPasses(host, tree) for tree in trees]),
            ):
                pairs = zip(_scores(passes), expected, strict=True)
                worst = [float(np.abs(found - right).max()) for found, right in pairs]
                yield {
                    "kind": "correct",
                    "model": label,
                    "precision": precision,
                    "graph": graph,
                    "worst": [round(each, 7) for each in worst],
                    "right": bool(np.max(worst) <= _TOLERANCES[precision]),  # false where one is NaN
                }


def _scores(passes: Sequence[HostPasses | PagedPasses]) -> list[Float32]:
    """Return the scores of each tree, from a pass over the prompt and one over the nodes."""
    found = []
    for (prompt, nodes), tree in zip(_LENGTHS, passes, strict=True):
        found.append(np.concatenate([tree.run(0, prompt), tree.run(prompt, prompt + nodes)]))
    return found
