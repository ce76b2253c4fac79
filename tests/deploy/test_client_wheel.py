"""The client's wheel: its contents, what it imports, and the contract that it carries for other languages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.deploy.test_wheel import ROOT, built_wheel, copied_sources

PUBLIC = ("errors", "explanation", "recommendation", "types")
MAX_MODULES = 60  # beyond those of grpc and protobuf

_IMPORT = """
import json, sys
import grpc, grpc.aio
import google.api.annotations_pb2, google.rpc.error_details_pb2, google.rpc.status_pb2
from google.protobuf import timestamp_pb2
before = set(sys.modules)
import atspeed_client
new = set(sys.modules) - before
others = {name.partition(".")[0] for name in new} - {"atspeed_client"} - sys.stdlib_module_names
print(json.dumps([atspeed_client.__file__, len(new), sorted(others)]))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, and unpack it as an installer does."""
    source = copied_sources(tmp_path_factory.mktemp("source"))
    wheel = built_wheel(source / "atspeed_client", tmp_path_factory.mktemp("wheel"))
    folder = tmp_path_factory.mktemp("client")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_is_one_typed_package_with_the_contract(unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == {"atspeed_client"}
    package = unpacked / "atspeed_client"
    assert (package / "py.typed").is_file()
    modules = {
        path.relative_to(ROOT) for path in (ROOT / "atspeed_client").rglob("*.py*") if "__pycache__" not in str(path)
    }
    assert modules <= {path.relative_to(unpacked) for path in package.rglob("*")} | {
        Path("atspeed_client/pyproject.toml")
    }
    shipped = {path.relative_to(package / "protos") for path in (package / "protos").rglob("*.proto")}
    assert shipped == {path.relative_to(ROOT / "protos") for path in (ROOT / "protos/google").rglob("*.proto")} | {
        Path(f"atspeed/v1/{name}.proto") for name in PUBLIC
    }
    for path in shipped:
        assert (package / "protos" / path).read_bytes() == (ROOT / "protos" / path).read_bytes()


def test_an_import_loads_grpc_and_protobuf_and_few_modules_more(unpacked: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT], cwd=unpacked, env=environment, capture_output=True, text=True, check=True
    )
    loaded_from, modules, others = json.loads(done.stdout)
    assert Path(loaded_from).is_relative_to(unpacked)
    assert others == []
    assert modules <= MAX_MODULES


def test_the_distributions_fit_each_other_and_their_stubs() -> None:
    """One version; and no older protobuf or grpcio than the stubs were generated for, which refuse it."""
    projects = {
        name: tomllib.loads((ROOT / name / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for name in (".", "atspeed_client")
    }
    assert f"atspeed-client=={projects['atspeed_client']['version']}" in projects["."]["dependencies"]
    assert projects["."]["version"] == projects["atspeed_client"]["version"] == version("atspeed-serving")
    stub = (ROOT / "atspeed/v1/types_pb2.py").read_text(encoding="utf-8")
    (generated,) = [
        line.split(":")[1].strip() for line in stub.splitlines() if line.startswith("# Protobuf Python Version")
    ]
    for project in projects.values():
        assert f"protobuf>={generated}" in project["dependencies"]
    grpc_stub = (ROOT / "atspeed/v1/types_pb2_grpc.py").read_text(encoding="utf-8")
    (made_for,) = [line.split("'")[1] for line in grpc_stub.splitlines() if line.startswith("GRPC_GENERATED_VERSION")]
    assert f"grpcio>={made_for}" in projects["."]["dependencies"]
