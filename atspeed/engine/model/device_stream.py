"""Order of a device's work: copies in, passes, copies back, and one wait for all.

onnxruntime waits after every copy and every run. On a stream of our own nothing waits but `wait`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from atspeed.engine.errors import DeviceError
from atspeed.engine.model.cuda_runtime import call
from atspeed.engine.model.provider import Provider

Bytes = npt.NDArray[np.uint8]

# Of cudaMemcpyKind.
_TO_DEVICE, _TO_HOST = 1, 2
_NON_BLOCKING = 1  # cudaStreamNonBlocking: independent of the streams of other threads


class DeviceStream(Protocol):
    """Work that is done in the order in which it is enqueued. For one thread at a time. All methods raise DeviceError.

    Attributes:
        provider_options: options of sessions whose runs are part of the order.
    """

    provider_options: Mapping[str, str]

    def buffer(self, size: int) -> Bytes:
        """Return zeros on the host for copies: uint8 [size]."""

    def run_options(self, graph: int = -1) -> ort.RunOptions:
        """Return the options of runs. graph: the number of the CUDA graph that they capture or replay; -1 for none."""

    def to_device(self, host: Bytes, value: ort.OrtValue) -> None:
        """Enqueue a copy of a `buffer` to the memory of a value. The buffer must stay as it is until `wait` returns."""

    def to_host(self, value: ort.OrtValue, host: Bytes) -> None:
        """Enqueue a copy of the first bytes of a value, as many as `host` has, which is part of a `buffer`."""

    def wait(self) -> None:
        """Wait until all of it is done."""


class WaitingStream:
    """The order by onnxruntime's own calls, each of which waits: for every provider."""

    provider_options: Mapping[str, str] = {}

    def buffer(self, size: int) -> Bytes:
        """Return zeros."""
        return np.zeros(size, dtype=np.uint8)

    def run_options(self, graph: int = -1) -> ort.RunOptions:  # noqa: ARG002 - nothing is captured
        """Return plain options."""
        return ort.RunOptions()

    def to_device(self, host: Bytes, value: ort.OrtValue) -> None:
        """Copy."""
        value.update_inplace(host)

    def to_host(self, value: ort.OrtValue, host: Bytes) -> None:
        """Copy."""
        host[:] = value.numpy().reshape(-1).view(np.uint8)[: len(host)]

    def wait(self) -> None:
        """Return: everything is done."""


class CudaStream:
    """A stream of CUDA. It is small, and is never destroyed: sessions refer to it as long as they live."""

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()
        call("cudaStreamCreateWithFlags", ctypes.byref(self._handle), _NON_BLOCKING)
        self.provider_options: Mapping[str, str] = {"user_compute_stream": str(self._handle.value)}

    def buffer(self, size: int) -> Bytes:
        """Return zeros in pinned memory: a copy from pageable memory would wait."""
        address = ctypes.c_void_p()
        call("cudaHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), 0)
        memory = (ctypes.c_uint8 * size).from_address(address.value or 0)
        # Not at the interpreter's exit: the process's end frees it, and CUDA may be gone before.
        weakref.finalize(memory, _free, address).atexit = False
        buffer: Bytes = np.ctypeslib.as_array(memory)
        buffer[:] = 0
        return buffer

    def run_options(self, graph: int = -1) -> ort.RunOptions:
        """Return options by which a run does not wait."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def to_device(self, host: Bytes, value: ort.OrtValue) -> None:
        """Enqueue the copy."""
        self._copy(value.data_ptr(), host.ctypes.data, len(host), _TO_DEVICE)

    def to_host(self, value: ort.OrtValue, host: Bytes) -> None:
        """Enqueue the copy."""
        self._copy(host.ctypes.data, value.data_ptr(), len(host), _TO_HOST)

    def wait(self) -> None:
        """Wait for the stream; an error of anything on it is raised here at the latest."""
        call("cudaStreamSynchronize", self._handle)

    def _copy(self, to: int, source: int, size: int, kind: int) -> None:
        addresses = (ctypes.c_void_p(to), ctypes.c_void_p(source))
        call("cudaMemcpyAsync", *addresses, ctypes.c_size_t(size), kind, self._handle)


def _free(pinned: ctypes.c_void_p) -> None:
    with suppress(DeviceError):  # of a device that has failed
        call("cudaFreeHost", pinned)


def device_stream(provider: Provider) -> DeviceStream:
    """Return a new stream of a provider's device. Raises DeviceError."""
    return CudaStream() if provider == "cuda" else WaitingStream()
