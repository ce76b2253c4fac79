"""Pools of keys and values on a device, and the way of rows to and from the host."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import onnxruntime as ort

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.errors import BundleError, DeviceError
from atspeed.engine.model.capture_lock import DEVICE
from atspeed.engine.model.decoder import RuntimeOptions, open_session
from atspeed.engine.model.device_graph import FREE_SLOTS_FROM, ZERO_SLOT, pool_names
from atspeed.engine.model.onnx_bytes import ELEMENT_TYPES, Node, Tensor, model_bytes

# Slots that one step overwrites with zeros: it bounds the zeros that are copied at a time.
_ZEROED_AT_ONCE = 4096


def host_dtype(dtype: str) -> np.dtype[np.generic]:
    """Return numpy's number format for a tensor's bytes. numpy has no bfloat16: its bytes travel as uint16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def allocate(axes: Sequence[int], dtype: str, device: str) -> ort.OrtValue:
    """Reserve memory on a device. Raises DeviceError with the number of bytes."""
    try:
        with DEVICE.using():
            return ort.OrtValue.ortvalue_from_shape_and_type(list(axes), ELEMENT_TYPES[dtype], device)
    except Exception as error:  # onnxruntime raises a dozen unrelated types here
        size = prod(axes) * host_dtype(dtype).itemsize
        raise DeviceError(f"{device}: no room for {size / 2**20:.1f} MiB: {error}") from error


class DevicePools:
    """One pool of keys and one of values per layer, [slots, width] each, at fixed addresses of the device.

    Memory is reserved at once. `read` and `write` are graphs of one node per pool, in sessions of their own: threads may use them
    beside a pass, as long as no pass reads or writes the same slots. Raises BundleError when the pools do not fit the device.

    Args:
        layers: number of layers.
        width: values of a key or value, kv_heads * head_dim.
        dtype: float32, float16 or bfloat16.
        slots: the number of slots, those that no token may have included.
        options: the options of onnxruntime.

    Attributes:
        nbytes: bytes on the device.
    """

    def __init__(self, layers: int, width: int, dtype: str, slots: int, options: RuntimeOptions) -> None:
        self._names = [name for pair in pool_names(layers) for name in pair]
        self._outputs = [name for pair in pool_names(layers, out=True) for name in pair]
        self._layers, self._width, self._slots = layers, width, slots
        self._element, self._host_dtype = ELEMENT_TYPES[dtype], host_dtype(dtype)
        self.nbytes = 2 * layers * slots * width * self._host_dtype.itemsize
        try:
            self._pools = [allocate((slots, width), dtype, options.provider) for _ in self._names]
        except DeviceError as error:
            raise BundleError(
                f"kv_device_mb: keys and values of {slots} tokens take {self.nbytes / 2**20:.0f} MiB. {error}"
            ) from error
        self._gather = _session("gather", _gather_graph(self._names, self._outputs, dtype, width), options)
        self._scatter = _session("scatter", _scatter_graph(self._names, self._outputs, dtype, width), options)
        self.zero(np.arange(ZERO_SLOT, FREE_SLOTS_FROM))

    def bind(self, binding: ort.IOBinding) -> None:
        """Bind the pools as inputs, and as outputs in the same memory."""
        for name, output, pool in zip(self._names, self._outputs, self._pools, strict=True):
            binding.bind_ortvalue_input(name, pool)
            binding.bind_ortvalue_output(output, pool)

    @DEVICE.using()
    def read(self, slots: Int64) -> KvArray:
        """Copy rows of the pools to the host: [layers, 2, n, width] for slots [n]. Raises DeviceError."""
        rows = np.empty((self._layers, 2, len(slots), self._width), dtype=self._host_dtype)
        binding = self._gather.io_binding()
        binding.bind_cpu_input("slots", np.ascontiguousarray(slots, dtype=np.int64))
        flat = rows.reshape(-1, *rows.shape[2:])
        for name, output, pool, into in zip(self._names, self._outputs, self._pools, flat, strict=True):
            binding.bind_ortvalue_input(name, pool)
            binding.bind_output(output, "cpu", 0, self._element, into.shape, into.__array_interface__["data"][0])
        _run(self._gather, binding)
        return rows

    @DEVICE.using()
    def write(self, slots: Int64, rows: KvArray) -> None:
        """Copy rows [layers, 2, n, width] of the host into the pools' slots [n], which differ. Raises DeviceError."""
        if rows.shape != (self._layers, 2, len(slots), self._width) or rows.dtype != self._host_dtype:
            raise ValueError(f"rows: {rows.dtype}{list(rows.shape)} for {len(slots)} slots")
        rows = np.ascontiguousarray(rows)
        binding = self._scatter.io_binding()
        binding.bind_cpu_input("slots", np.ascontiguousarray(slots, dtype=np.int64)[:, None])
        flat = rows.reshape(-1, *rows.shape[2:])
        for name, part in zip(self._names, flat, strict=True):
            binding.bind_input(f"rows_{name}", "cpu", 0, self._element, part.shape, part.__array_interface__["data"][0])
        self.bind(binding)
        _run(self._scatter, binding)

    def zero(self, slots: Int64) -> None:
        """Overwrite slots with zeros. Raises DeviceError."""
        for start in range(0, len(slots), _ZEROED_AT_ONCE):
            part = slots[start : start + _ZEROED_AT_ONCE]
            self.write(part, np.zeros((self._layers, 2, len(part), self._width), dtype=self._host_dtype))


def _session(name: str, graph: bytes, options: RuntimeOptions) -> ort.InferenceSession:
    return open_session(ModelFiles(Path(f"{name}.onnx"), graph, {}), options)


def _run(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    try:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
    except Exception as error:
        raise DeviceError(f"the device did not move keys and values: {error}") from error


def _gather_graph(names: Sequence[str], outputs: Sequence[str], dtype: str, width: int) -> bytes:
    return model_bytes(
        [Node("Gather", (name, "slots"), (output,)) for name, output in zip(names, outputs, strict=True)],
        [Tensor("slots", "int64", ("n",)), *(Tensor(name, dtype, ("slots", width)) for name in names)],
        [Tensor(output, dtype, ("n", width)) for output in outputs],
    )


def _scatter_graph(names: Sequence[str], outputs: Sequence[str], dtype: str, width: int) -> bytes:
    pools = [Tensor(name, dtype, ("slots", width)) for name in names]
    rows = [Tensor(f"rows_{name}", dtype, ("n", width)) for name in names]
    return model_bytes(
        [
            Node("ScatterND", (name, "slots", f"rows_{name}"), (output,))
            for name, output in zip(names, outputs, strict=True)
        ],
        [Tensor("slots", "int64", ("n", 1)), *pools, *rows],
        [Tensor(output, dtype, ("slots", width)) for output in outputs],
    )
