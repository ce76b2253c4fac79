"""Generate the Python stubs of the .proto files. `--check` fails when the committed ones are stale.

The services' stubs are `atspeed.v1`. Those of the public contract are in the client's distribution too, as `atspeed_client.v1`.
Its descriptors and its OpenAPI document are in `atspeed/edge`, for the way in by HTTP.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc
from openapi import document

ROOT = Path(__file__).parent
PACKAGES = ROOT.parent
PUBLIC = ("errors", "explanation", "recommendation", "types")


def generate(target: Path) -> list[Path]:
    """Write all stubs and their types under `target`; returns the files, relative to it."""
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "atspeed").rglob("*.proto"))
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    typed = [f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}"]
    _run(*outputs, *typed, *sources)
    services = sorted((target / "atspeed/v1").glob("*_pb2*.py*"))
    stubs = [path.relative_to(target) for path in services if path.suffix in {".py", ".pyi"}]
    return [*stubs, *_client_stubs(target), *_edge_files(target)]


def _client_stubs(target: Path) -> list[Path]:
    """Copy the messages of the public contract into the client's package."""
    folder = Path("atspeed_client/v1")
    (target / folder).mkdir(parents=True, exist_ok=True)
    copies = [folder / f"{name}_pb2{suffix}" for name in PUBLIC for suffix in (".py", ".pyi")]
    for copy in copies:
        text = (target / "atspeed/v1" / copy.name).read_text(encoding="utf-8")
        imports = re.sub(r"^from atspeed\.v1 import ", "from atspeed_client.v1 import ", text, flags=re.MULTILINE)
        (target / copy).write_text(imports, encoding="utf-8")
    return copies


def _edge_files(target: Path) -> list[Path]:
    """Write the public contract's descriptors, with the details of errors, and the OpenAPI document of its HTTP paths."""
    folder = Path("atspeed/edge")
    (target / folder).mkdir(parents=True, exist_ok=True)
    public = [f"atspeed/v1/{name}.proto" for name in PUBLIC]
    written = target / folder / "contract.pb"
    _run("--include_imports", f"--descriptor_set_out={written}", *public, "google/rpc/error_details.proto")
    described = target / folder / "openapi.json"
    described.write_text(_openapi(*public), encoding="utf-8")
    return [folder / written.name, folder / described.name]


def _openapi(*sources: str) -> str:
    """Return the OpenAPI document, which needs the comments of the .proto files."""
    with tempfile.NamedTemporaryFile() as file:
        options = ("--include_imports", "--include_source_info", f"--descriptor_set_out={file.name}")
        _run(*options, *sources, "google/rpc/error_details.proto")
        descriptors = FileDescriptorSet.FromString(Path(file.name).read_bytes())
    return json.dumps(document(descriptors), indent=1) + "\n"


def _run(*arguments: str) -> None:
    include = files("grpc_tools") / "_proto"
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{include}", *arguments]):
        raise SystemExit("protoc failed")


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
