"""The wheel: its contents, and an application that has packages with common names of its own beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"atspeed", "draft_service", "orchestrator", "target_service"}
COMMON_NAMES = ("benchmarks", "client", "engine", "service_kit", "training")

# Not part of a source tree: what git ignores or fetches, and bundles, which are large.
_NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "bundles", "dist", "node_modules", "shared", "var"
)

_BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"

# An application that imports packages of its own, then this project's command line.
_APPLICATION = f"""
import sys

import {", ".join(COMMON_NAMES)}
from atspeed.cli import connection
from atspeed.rpc.addresses import target_uri

print(*[package.OWNER for package in ({", ".join(COMMON_NAMES)})])
print(target_uri(connection.LOCAL))
print(*sorted({{
    module.__file__ for name, module in sys.modules.items()
    if name.partition(".")[0] in {sorted(PACKAGES)} and module.__file__
}}), sep="\\n")
"""


def copied_sources(folder: Path) -> Path:
    """A copy of the source tree; links become files."""
    shutil.copytree(ROOT, folder / "checkout", ignore=_NOT_SOURCE)
    return folder / "checkout"


def built_wheel(source: Path, out: Path) -> Path:
    """The wheel of the distribution whose pyproject.toml is in `source`."""
    done = subprocess.run([sys.executable, "-c", _BUILD, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that the checkout stays clean and an old build folder adds nothing."""
    source = copied_sources(tmp_path_factory.mktemp("source"))
    return built_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel into a folder, as an installer does."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an application whose packages have common names."""
    folder = tmp_path_factory.mktemp("application")
    for name in COMMON_NAMES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('OWNER = "application"\n', encoding="utf-8")
    (folder / "main.py").write_text(_APPLICATION, encoding="utf-8")
    return folder


def _run(application: Path, unpacked: Path, *arguments: str) -> str:
    """Run Python in the application's folder: its packages come first on the path, then the wheel's, then the client."""
    client = unpacked.parent / "client"
    if not client.exists():
        client.mkdir()
        shutil.copytree(ROOT / "atspeed_client", client / "atspeed_client")
    path = os.pathsep.join([str(application), str(unpacked), str(client)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ATSPEED_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=application,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_top_level_names_are_the_four_packages(unpacked: Path) -> None:
    names = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert names == PACKAGES


def test_wheel_holds_every_module_of_its_packages_and_nothing_else(unpacked: Path) -> None:
    """The wheel holds no test and no study, but every generated stub and the marker of typed packages."""

    def files(root: Path) -> set[str]:
        found = {path.relative_to(root) for package in PACKAGES for path in (root / package).rglob("*")}
        return {str(path) for path in found if (root / path).is_file() and "__pycache__" not in path.parts}

    held = files(unpacked)
    assert held == files(ROOT)
    assert "atspeed/py.typed" in held
    for contract in ("draft", "errors", "recommendation", "target", "types"):
        stubs = {f"atspeed/v1/{contract}_pb2{part}" for part in (".py", ".pyi", "_grpc.py", "_grpc.pyi")}
        assert stubs <= held
    assert not {part for path in held for part in Path(path).parts} & {"tests", "research", "conftest.py"}


def test_application_with_packages_of_common_names_imports_its_own_and_the_wheels(
    application: Path, unpacked: Path
) -> None:
    owners, target, *loaded = _run(application, unpacked, "main.py").splitlines()
    assert owners.split() == ["application"] * len(COMMON_NAMES)
    assert target == "ipv4:127.0.0.1:50051"
    assert loaded
    assert [path for path in loaded if not Path(path).is_relative_to(unpacked)] == []


@pytest.mark.parametrize("module", ["orchestrator", "draft_service", "target_service", "atspeed.cli"])
def test_command_beside_packages_of_common_names_shows_its_help(application: Path, unpacked: Path, module: str) -> None:
    """`python -m` puts the current folder first on the path, which here is the application's."""
    shown = _run(application, unpacked, "-m", module, "--help")
    assert "usage" in shown.lower()
    located = f"import {module.partition('.')[0]} as found; print(found.__file__)"
    assert Path(_run(application, unpacked, "-c", located).strip()).is_relative_to(unpacked)
