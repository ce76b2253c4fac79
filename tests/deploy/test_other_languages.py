"""Stubs of the contract for Go and Java, made from the .proto files that the client ships, and compiled.

Debian has the toolchains: protobuf-compiler and libprotobuf-java; golang-go, protoc-gen-go, protoc-gen-go-grpc and
golang-google-{protobuf,genproto,grpc}-dev.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import atspeed_client

PROTOS = atspeed_client.PROTOS
CONTRACT = sorted(path.relative_to(PROTOS).as_posix() for path in (PROTOS / "atspeed").rglob("*.proto"))
GOOGLE = sorted(path.relative_to(PROTOS).as_posix() for path in (PROTOS / "google").rglob("*.proto"))
JAR = Path("/usr/share/java/protobuf.jar")
GO_PACKAGES = Path("/usr/share/gocode")


def run(*command: object, **options: object) -> None:
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr


def needed(*programs: str, files: tuple[Path, ...]) -> None:
    """Skip the test, with what is missing."""
    missing = [name for name in programs if shutil.which(name) is None]
    missing += [str(path) for path in files if not path.exists()]
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")


def test_java_stubs_compile(tmp_path: Path) -> None:
    needed("protoc", "javac", files=(JAR,))
    run("protoc", f"-I{PROTOS}", f"--java_out={tmp_path}", *CONTRACT, *GOOGLE)
    sources = list(tmp_path.rglob("*.java"))
    assert tmp_path / "com/atspeed/v1/RecommendRequest.java" in sources
    run("javac", "-nowarn", "-d", tmp_path / "classes", "-cp", JAR, *sources)
    assert (tmp_path / "classes/com/atspeed/v1/RecommendResponse.class").is_file()


def test_go_stubs_compile(tmp_path: Path) -> None:
    needed("protoc", "go", "protoc-gen-go", "protoc-gen-go-grpc", files=(GO_PACKAGES / "src/google.golang.org/grpc",))
    source = tmp_path / "src"
    source.mkdir()
    run("protoc", f"-I{PROTOS}", f"--go_out={source}", f"--go-grpc_out={source}", *CONTRACT)
    assert (source / "atspeed/v1/recommendation_grpc.pb.go").is_file()
    environment = {**os.environ, "GOPATH": f"{tmp_path}:{GO_PACKAGES}", "GO111MODULE": "off", "GOFLAGS": ""}
    run("go", "build", ".", cwd=source / "atspeed/v1", env=environment)
