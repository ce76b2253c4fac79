"""Free memory of a device, and the share that keys and values take by default."""

from __future__ import annotations

import ctypes
from contextlib import suppress

from atspeed.engine.model.decoder import Provider

# Share of what is free beside the weights. The rest is for activations, CUDA graphs and the next version of the model, which a
# hot reload loads beside this one. Chosen, not measured.
_SHARE = 0.5
# On a host, and on a device that does not say what is free.
_DEFAULT_BYTES = 4 * 2**30
# CUDA's runtime by its major versions, newest first.
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


def default_pool_bytes(provider: Provider) -> int:
    """Return the bytes that keys and values take on a provider's device, if no setting says so."""
    free = _free_cuda_bytes() if provider == "cuda" else None
    return _DEFAULT_BYTES if free is None else int(free * _SHARE)


def _free_cuda_bytes() -> int | None:
    """Return the free bytes of the current CUDA device; None when its runtime does not say."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    for name in _RUNTIMES:
        with suppress(OSError, AttributeError):
            if ctypes.CDLL(name).cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0:
                return free.value
    return None
