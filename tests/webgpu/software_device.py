"""Real device memory without a GPU: onnxruntime's WebGPU provider on SwiftShader, a Vulkan device in software.

Kernels run and device memory is apart from the host's, so results can be compared with the CPU's.
The first pass of each kind takes seconds, and only small models in float32 make sense.
Nodes that the provider has no kernel for run on the CPU, with copies both ways; Attention and TensorScatter are among them.

    with on_webgpu():
        decoder = Decoder(path, RuntimeOptions())
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnxruntime

from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.model import decoder
from atspeed.engine.model.decoder import RuntimeOptions

# Where `make tools` leaves the Vulkan loader and SwiftShader.
FOLDER = Path(__file__).parents[2] / "var" / "swiftshader"
NAME = "WebGpuExecutionProvider"


def missing() -> str:
    """Return the part of the environment that is not there; empty if nothing is missing."""
    if find_spec("onnxruntime_ep_webgpu") is None:
        return "onnxruntime-ep-webgpu is not installed"
    if not (FOLDER / "libvk_swiftshader.so").is_file():
        return "SwiftShader is not there: make tools fetches it where there is apt-get"
    return ""


@cache
def devices() -> Sequence[Any]:
    """Register the provider with onnxruntime, in this process for good. Returns its devices: one."""
    import onnxruntime_ep_webgpu  # not installed everywhere

    driver = str(FOLDER / "vk_swiftshader_icd.json")
    # Read by the Vulkan loader and by the provider when they load.
    os.environ |= {"VK_DRIVER_FILES": driver, "VK_ICD_FILENAMES": driver, "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1"}
    ctypes.CDLL(str(FOLDER / "libvulkan.so.1"), mode=ctypes.RTLD_GLOBAL)
    onnxruntime.set_default_logger_severity(3)  # it warns that the device is software
    onnxruntime.register_execution_provider_library("webgpu", onnxruntime_ep_webgpu.get_library_path())
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == NAME]


@contextmanager
def on_webgpu() -> Iterator[None]:
    """Open every model in the block on the software device, whatever provider its options name."""
    with patch.object(decoder, "open_session", _open_session):
        yield


def _open_session(files: ModelFiles, options: RuntimeOptions) -> onnxruntime.InferenceSession:
    settings = decoder._session_options(options)
    memory = {files.path.name: files.graph, **files.weights}
    settings.add_external_initializers_from_files_in_memory(
        list(memory), list(memory.values()), [len(content) for content in memory.values()]
    )
    settings.add_provider_for_devices(devices(), {})
    session = onnxruntime.InferenceSession(files.graph, settings)
    if session.get_providers()[0] != NAME:
        raise RuntimeError(f"onnxruntime chose {session.get_providers()}")
    return session
