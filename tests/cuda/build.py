"""Builds the stand-ins for CUDA's libraries, with g++ and the headers of NVIDIA's wheels.

    python -m tests.cuda.build INCLUDE OUT

INCLUDE is the folder of cuda_runtime_api.h. The functions are compiled against it, so a wrong signature is a compiler's error.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).parent / "stand_ins"

# Libraries in the order in which they load: all others write to the record in the first.
LIBRARIES = {
    "libcudart.so.13": ("trace.cpp", "memory.cpp", "kernels.cpp", "streams.cpp", "device.cpp"),
    "libcublasLt.so.13": ("cublas_lt.cpp",),
    "libcublas.so.13": ("cublas.cpp",),
    "libcurand.so.10": ("curand.cpp",),
    "libcuda.so.1": ("cuda.cpp",),
    "libcudnn.so.9": ("cudnn.cpp",),
}

# onnxruntime asks for these with a version of the symbols.
_VERSIONED = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")


def build(include: Path, out: Path) -> None:
    """Compile every library into `out`. Raises CalledProcessError after the compiler's own message."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        for name, sources in LIBRARIES.items():
            command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{include}"]
            command += [str(SOURCES / source) for source in sources]
            command += ["-o", str(out / name), f"-Wl,-soname,{name}"]
            if name in _VERSIONED:
                versions = Path(scratch, name)
                versions.write_text(f"{name} {{ global: *; }};")
                command.append(f"-Wl,--version-script={versions}")
            if name != "libcudart.so.13":
                command += [f"-L{out}", "-l:libcudart.so.13"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
