"""CUDA sessions without a GPU: the real onnxruntime on stand-ins for CUDA's libraries, every call counted.

Kernels are counted by name and not run, so outputs mean nothing. Placement, choice of kernels, copies, synchronisations,
allocations and graph captures are those that a GPU would get.

    with counted() as made:
        decoder.run(...)
    assert made.synchronisations.total() == 1
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path

import onnxruntime

from tests.cuda.build import LIBRARIES

FOLDER = Path(sys.prefix, "lib", "cuda-dry-run")

# cudaErrorMemoryAllocation, cudaErrorIllegalAddress
OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700

# Kernels of attention: one that never writes the scores to memory, and the softmax of one that does.
FUSED_ATTENTION = ("attention_kernel_batched_impl", "flash_fwd")
UNFUSED_ATTENTION = ("UnfusedSoftmax", "UnfusedAttention")

_FUNCTION = re.compile(r"[A-Za-z_]\w*")


class Place(StrEnum):
    """Place of memory. Pageable memory is what CUDA does not know; a copy from it waits."""

    DEVICE = "device"
    PINNED = "pinned"
    PAGEABLE = "pageable"


@dataclass(frozen=True)
class Copy:
    """One copy. `bytes` is its size."""

    source: Place
    destination: Place
    bytes: int


@dataclass
class Counts:
    """Calls of CUDA, counted within `counted`; empty until it ends.

    Attributes:
        kernels: launches by the kernel's whole name, with types and arguments; products are there with their sizes.
        copies: in order. Copies inside a captured graph are not among them.
        synchronisations: waits of the host, by function.
        allocated: bytes of each new allocation of device memory.
        pinned: bytes of each new allocation of pinned memory.
        fills: number of memset calls.
        captures: kernels of each graph captured.
        replays: kernels of each graph launched.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    copies: list[Copy] = field(default_factory=list)
    synchronisations: Counter[str] = field(default_factory=Counter)
    allocated: list[int] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    fills: int = 0
    captures: list[int] = field(default_factory=list)
    replays: list[int] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """Number of launches: of kernels, and of graphs, each of which is one."""
        return self.kernels.total() + len(self.replays)

    @property
    def to_device(self) -> list[Copy]:
        """Copies from the host to the device."""
        return [one for one in self.copies if one.source != Place.DEVICE and one.destination == Place.DEVICE]

    @property
    def to_host(self) -> list[Copy]:
        """Copies from the device to the host."""
        return [one for one in self.copies if one.source == Place.DEVICE and one.destination != Place.DEVICE]

    @property
    def on_device(self) -> list[Copy]:
        """Copies within the device's memory."""
        return [one for one in self.copies if one.source == one.destination == Place.DEVICE]

    def functions(self) -> Counter[str]:
        """Return launches by the kernel's bare name, without types, namespaces and sizes."""
        found: Counter[str] = Counter()
        for name, number in self.kernels.items():
            found[bare(name)] += number
        return found

    def of(self, *parts: str) -> int:
        """Return the number of launches of kernels whose name holds one of the parts."""
        return sum(number for name, number in self.kernels.items() if any(part in name for part in parts))


def bare(kernel: str) -> str:
    """Return a kernel's name without result type, namespaces, template arguments, parameters and sizes."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    match = _FUNCTION.search(re.sub(r"\b\w+::", "", name))
    return match[0] if match else name


def available() -> bool:
    """Return True in an environment with the wheel for CUDA and the stand-ins: the one of `make cuda-tests`."""
    return FOLDER.is_dir() and "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@cache
def load() -> ctypes.CDLL:
    """Load the stand-ins into this process, before its first CUDA session. Returns the library with the record."""
    libraries = [ctypes.CDLL(str(FOLDER / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
    library = libraries[0]
    library.dry_run_read.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.dry_run_fail.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    library.dry_run_set_memory.argtypes = library.dry_run_drop_above.argtypes = [ctypes.c_size_t]
    library.dry_run_read.restype = library.dry_run_used_memory.restype = ctypes.c_size_t
    return library


@contextmanager
def counted() -> Iterator[Counts]:
    """Count the calls of CUDA, of every thread, until the block ends. Blocks do not nest."""
    library, counts = load(), Counts()
    library.dry_run_start()
    try:
        yield counts
    finally:
        library.dry_run_stop()
        size = library.dry_run_read(None, 0)
        buffer = ctypes.create_string_buffer(size)
        library.dry_run_read(buffer, size)
        for event in json.loads(buffer.raw):
            _count(counts, event["kind"], event["name"], event["bytes"], Place(event["from"]), Place(event["to"]))


def _count(counts: Counts, kind: str, name: str, size: int, source: Place, destination: Place) -> None:
    match kind:
        case "kernel":
            counts.kernels[name] += 1
        case "copy":
            counts.copies.append(Copy(source, destination, size))
        case "sync":
            counts.synchronisations[name] += 1
        case "alloc":
            (counts.allocated if destination == Place.DEVICE else counts.pinned).append(size)
        case "memset":
            counts.fills += 1
        case "capture":
            counts.captures.append(int(name))
        case "replay":
            counts.replays.append(int(name))


def device_bytes() -> int:
    """Return the bytes of device memory that are allocated now, those of onnxruntime's arena included."""
    return int(load().dry_run_used_memory())


@contextmanager
def device_of(*, memory: int | None = None, capability: int = 90) -> Iterator[None]:
    """Give the device so many bytes, and this compute capability (10 * major + minor), for sessions opened in the block."""
    library = load()
    if memory is not None:
        library.dry_run_set_memory(memory)
    library.dry_run_set_capability(capability)
    try:
        yield
    finally:
        library.dry_run_set_memory(_MEMORY)
        library.dry_run_set_capability(90)


_MEMORY = 139 << 30


@contextmanager
def failing(function: str, *, after: int = 0, error: int = ILLEGAL_ADDRESS) -> Iterator[None]:
    """Break the device within the block: the function fails after so many calls, then every call does, as on a GPU.

    Args:
        function: cudaLaunchKernel (every launch counts as it), cudaMemcpyAsync, cudaMalloc, cudaStreamSynchronize,
            cudaGraphLaunch and the like.
        after: calls that work before.
        error: the number of the error, of cudaError_t.
    """
    library = load()
    library.dry_run_fail(function.encode(), after, error)
    try:
        yield
    finally:
        library.dry_run_mend()
