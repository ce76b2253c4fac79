"""A few calls of CUDA's runtime, by ctypes, that onnxruntime does not offer."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache

import onnxruntime as ort

from atspeed.engine.errors import DeviceError

# Majors of CUDA's runtime besides that of onnxruntime, newest first.
_MAJORS = ("13", "12")


@cache
def runtime() -> ctypes.CDLL | None:
    """Return the runtime that onnxruntime was built for, or else another one; None where there is none."""
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from the wheels that the extra `gpu` installs
    own = str(getattr(ort, "cuda_version", "")).partition(".")[0]
    for major in dict.fromkeys(filter(None, (own, *_MAJORS))):
        with suppress(OSError):
            return ctypes.CDLL(f"libcudart.so.{major}")
    return None


def call(function: str, *arguments: object) -> None:
    """Call a function of the runtime. Raises DeviceError with its name and CUDA's message."""
    library = runtime()
    if library is None:
        raise DeviceError(f"{function}: CUDA's runtime cannot be loaded")
    if code := getattr(library, function)(*arguments):
        library.cudaGetErrorString.restype = ctypes.c_char_p
        raise DeviceError(f"{function}: {library.cudaGetErrorString(code).decode()} (CUDA error {code})")


def free_bytes() -> int | None:
    """Return the free bytes of the current device; None when the runtime does not say."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with suppress(DeviceError):
        call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value
    return None
