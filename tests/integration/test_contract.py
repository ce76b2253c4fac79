"""The contract as other languages and later revisions need it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import google.api
import google.rpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from atspeed.v1 import draft_pb2, errors_pb2, explanation_pb2, recommendation_pb2, target_pb2, types_pb2

ROOT = Path(__file__).parents[2]
MODULES = (draft_pb2, errors_pb2, explanation_pb2, recommendation_pb2, target_pb2, types_pb2)
FILES = [module.DESCRIPTOR for module in MODULES]
FIELDS = [field for file in FILES for message in file.message_types_by_name.values() for field in message.fields]
UNSIGNED = {FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64}
TIMES = re.compile(r"_(ns|us|seconds|millis|nanos)$")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.name))
def test_every_file_has_the_options_of_other_languages(file: object) -> None:
    options = file.GetOptions()  # type: ignore[attr-defined]
    assert (options.go_package, options.java_package) == ("atspeed/v1;atspeedv1", "com.atspeed.v1")
    assert (options.java_multiple_files, options.csharp_namespace) == (True, "AtSpeed.V1")


def test_integers_are_signed_and_times_are_milliseconds() -> None:
    assert [field.full_name for field in FIELDS if field.cpp_type in UNSIGNED] == []
    assert [field.full_name for field in FIELDS if TIMES.search(field.name)] == []
    arrays = {"atspeed.v1.CostCurve.forward_ms"}
    milliseconds = [field for field in FIELDS if field.name.endswith("_ms") and field.full_name not in arrays]
    assert {field.cpp_type for field in milliseconds} == {FieldDescriptor.CPPTYPE_DOUBLE}


@pytest.mark.parametrize("path", sorted((ROOT / "protos/google").rglob("*.proto")), ids=lambda path: str(path.name))
def test_copies_of_googleapis_are_those_of_its_package(path: Path) -> None:
    """They are here so that every tool compiles the contract without a registry."""
    package = google.api if path.parent.name == "api" else google.rpc
    (folder,) = package.__path__
    assert path.read_bytes() == (Path(folder) / path.name).read_bytes()


def git(folder: Path, *arguments: str) -> None:
    names = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True)


def breaking(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "protos/compatible.py"], cwd=folder, check=False, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository whose only commit has the contract."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "protos", folder / "protos", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "buf.yaml", folder)
    git(tmp_path, "init", "--quiet", str(folder))
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "contract")
    return folder


def rewrite(folder: Path, old: str, new: str) -> None:
    path = folder / "protos/atspeed/v1/recommendation.proto"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


BROKEN = ("  string tenant = 13;", "  int32 tenant = 13;")
ADDED = ("message GetServiceInfoRequest {}", "message GetServiceInfoRequest {\n  // New.\n  bool verbose = 1;\n}")


def test_a_breaking_change_is_found_before_and_after_its_commit(checkout: Path) -> None:
    assert breaking(checkout).returncode == 0
    rewrite(checkout, *BROKEN)
    for _ in range(2):
        done = breaking(checkout)
        assert done.returncode != 0
        assert "tenant" in done.stdout
        git(checkout, "commit", "--quiet", "--allow-empty", "--all", "--message", "breaks")


def test_an_added_field_is_no_breaking_change(checkout: Path) -> None:
    rewrite(checkout, *ADDED)
    for _ in range(2):
        assert breaking(checkout).returncode == 0
        git(checkout, "commit", "--quiet", "--allow-empty", "--all", "--message", "adds")


def test_a_shallow_clone_compares_what_it_has(checkout: Path, tmp_path: Path) -> None:
    """Without a change it has one revision only; a change is compared with it."""
    rewrite(checkout, *ADDED)
    git(checkout, "commit", "--quiet", "--all", "--message", "adds")
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth", "1", checkout.as_uri(), str(shallow))
    done = breaking(shallow)
    assert (done.returncode, done.stdout) == (0, "buf breaking: no earlier revision of the contract in this clone\n")
    rewrite(shallow, *BROKEN)
    assert breaking(shallow).returncode != 0


def test_a_folder_without_git_is_no_failure(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    done = breaking(checkout)
    assert done.returncode == 0
    assert "no git revision" in done.stdout
