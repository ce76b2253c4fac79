"""Configuration of the measurements on a GPU in minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.provider import Provider

SIZES = ("1.7b", "7b")


@dataclass(frozen=True)
class GpuConfig:
    """Configuration of the measurements.

    Attributes:
        provider: the hardware.
        minutes: time after which nothing new begins.
        sizes: names of `atspeed.training.inflation.SHAPES`, in this order.
        precision: the format of the large models' weights.
        threads: CPU threads of a pass.
        repeats: most repetitions of a measurement.
        passes: tokens of prompt and nodes of each pass, the most important one first.
        shared: tokens of prompt and nodes of the trees of a shared pass.
        pool_mb: memory for keys and values on the device, in MiB.
        seed: of the weights.
    """

    provider: Provider = "cuda"
    minutes: float = 4.0
    sizes: Sequence[str] = SIZES
    precision: Precision = "float16"
    threads: int = 1
    repeats: int = 20
    passes: Sequence[tuple[int, int]] = (
        (1000, 120),
        (1000, 1),
        (1000, 240),
        (128, 40),
        (1000, 40),
        (128, 1),
        (1000, 500),
    )
    shared: Sequence[tuple[int, int]] = ((1000, 60), (500, 60), (100, 60), (700, 20)) * 4
    pool_mb: int = 8192
    seed: int = 1

    @property
    def options(self) -> RuntimeOptions:
        """Options of onnxruntime on the device."""
        return RuntimeOptions(self.provider, self.threads)
