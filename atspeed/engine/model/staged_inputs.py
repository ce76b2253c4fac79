"""Small inputs of a graph that lie side by side on a device, at fixed addresses."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from atspeed.engine.model.device_pools import allocate
from atspeed.engine.model.device_stream import DeviceStream
from atspeed.engine.model.onnx_bytes import ELEMENT_TYPES

_ALIGNMENT = 256  # that of CUDA's own allocations

Axes = Mapping[str, tuple[str, tuple[int, ...]]]
"""The number format and the axes of each tensor, by name."""


def offsets_of(axes: Axes) -> tuple[dict[str, int], int]:
    """Return the place of each tensor in a buffer for all of them, and the bytes of the buffer."""
    offsets, size = {}, 0
    for name, (dtype, shape) in axes.items():
        offsets[name] = size
        size += -(-prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
    return offsets, size


def views(buffer: npt.NDArray[np.uint8], axes: Axes) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors in a buffer."""
    offsets, _ = offsets_of(axes)
    return {
        name: buffer[offsets[name] :][: prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
        for name, (dtype, shape) in axes.items()
    }


class StagedInputs:
    """Inputs that one copy brings to the device. Raises DeviceError without room.

    Args:
        binding: the binding of a session, to which the inputs are bound.
        axes: the inputs.
        device: onnxruntime's name of the device.
        stream: the order of the device's work.

    Attributes:
        arrays: the inputs on the host, zeros at first. They must not change between `copy` and the stream's `wait`.
    """

    def __init__(self, binding: ort.IOBinding, axes: Axes, device: str, stream: DeviceStream) -> None:
        offsets, size = offsets_of(axes)
        self._stream = stream
        self._host = stream.buffer(size)
        self._device = allocate((size,), "uint8", device)
        self.arrays = views(self._host, axes)
        for name, (dtype, shape) in axes.items():
            address = self._device.data_ptr() + offsets[name]
            binding.bind_input(name, device, 0, ELEMENT_TYPES[dtype], shape, address)

    def copy(self) -> None:
        """Enqueue the copy of the arrays to the device. Raises DeviceError."""
        self._stream.to_device(self._host, self._device)
