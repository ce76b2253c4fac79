"""Measurements on a GPU in minutes, the most important ones first.

Every row is a result at once.

1. Correctness of small models of every family and number format, against the CPU.
2. Copies between host and device.
3. Passes at the shapes of large models: the graph for devices eager and as CUDA graphs, shared passes, blocks of the prefix
   cache on their way in and out, and the host's graph.

Weights are made in memory: no checkpoint and no bundle is needed. `atspeed.benchmarks.gpu_lists` is the longer part: lists
with a trained draft. Everything runs on the CPU too, as in the tests.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import onnxruntime
import torch

from atspeed.benchmarks import gpu_passes
from atspeed.benchmarks.gpu_config import GpuConfig
from atspeed.benchmarks.gpu_correctness import correctness
from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.errors import BundleError, DeviceError
from atspeed.training.inflation import SHAPES

NAME = "gpu"

Row = dict[str, Any]


def check(config: GpuConfig) -> None:
    """Raise BenchmarkError if a size is unknown, or if onnxruntime has no CUDA."""
    if config.provider == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise BenchmarkError("--provider cuda: this onnxruntime has no CUDA; see deploy/gpu-setup.sh")
    for size in config.sizes:
        if size not in SHAPES:
            raise BenchmarkError(f"--size {size}: must be one of {', '.join(SHAPES)}")


def measure(config: GpuConfig) -> Iterator[Row]:
    """Yield rows, the most important ones first, until the time is over. The last one names what was left out.

    A part that fails yields a row of the kind `failed`, and the others follow.
    """
    end = time.monotonic() + 60 * config.minutes
    left_out = []
    for name, part in _parts(config).items():
        try:
            yield from _until(end, part())
        except (BundleError, DeviceError, RuntimeError, MemoryError) as error:
            yield {"kind": "failed", "part": name, "error": str(error).partition("\n")[0]}
        if time.monotonic() >= end:
            left_out.append(name)
        gc.collect()  # a device may hold the weights of one model only
    yield {"kind": "end", "cut": left_out}


def wrong(rows: Sequence[Row]) -> list[str]:
    """Return what failed or is not right, one line for each."""
    failed = [f"{row['part']}: {row['error']}" for row in rows if row["kind"] == "failed"]
    differ = [row for row in rows if row["kind"] == "correct" and not row["right"]]
    return failed + [
        f"{row['model']}, {row['precision']}, graph of the {row['graph']}: {max(row['worst'])} off" for row in differ
    ]


def header(config: GpuConfig) -> dict[str, Any]:
    """Return the header's fields."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else config.provider
    return {"benchmark": NAME, "device": device, **asdict(config)}


def _parts(config: GpuConfig) -> dict[str, Callable[[], Iterator[Row]]]:
    return {
        "correctness": partial(correctness, config),
        "machine": partial(gpu_passes.machine, config),
        **{f"passes of {size}": partial(gpu_passes.passes, size, config) for size in config.sizes},
    }


def _until(end: float, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows until the time is over."""
    while time.monotonic() < end and (row := next(rows, None)) is not None:
        yield row
