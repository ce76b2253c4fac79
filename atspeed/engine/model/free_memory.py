"""Free memory of a device, and the share that keys and values take by default."""

from __future__ import annotations

from atspeed.engine.model.cuda_runtime import free_bytes
from atspeed.engine.model.provider import Provider

# Share of what is free beside the weights. The rest is for activations, CUDA graphs and the next version of the model, which a
# hot reload loads beside this one. Chosen, not measured.
_SHARE = 0.5
# On a host, and on a device that does not say what is free.
_DEFAULT_BYTES = 4 * 2**30


def default_pool_bytes(provider: Provider) -> int:
    """Return the bytes that keys and values take on a provider's device, if no setting says so."""
    free = free_bytes() if provider == "cuda" else None
    return _DEFAULT_BYTES if free is None else int(free * _SHARE)
