"""Generate the Python stubs of the .proto files, in `atspeed/v1`. `--check` fails when the committed ones are stale."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
PACKAGES = ROOT.parent  # the stubs are modules of the package `atspeed`


def generate(target: Path) -> list[Path]:
    """Write stubs and their types for every .proto under `target`; returns the files, relative to it."""
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "atspeed").rglob("*.proto"))
    include = str(files("grpc_tools") / "_proto")
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    typed = [f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}"]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{include}", *outputs, *typed, *sources]):
        raise SystemExit("protoc failed")
    return sorted(path.relative_to(target) for path in target.rglob("*_pb2*.py*") if path.suffix in {".py", ".pyi"})


def main() -> None:
    """Generate in place, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        generate(PACKAGES)
        return
    with tempfile.TemporaryDirectory() as folder:
        stale = [
            path.as_posix()
            for path in generate(Path(folder))
            if not (PACKAGES / path).exists() or (PACKAGES / path).read_bytes() != (Path(folder) / path).read_bytes()
        ]
    if stale:
        sys.exit(f"stale stubs, run `make protos`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
