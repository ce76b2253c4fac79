"""Tools that `make tools` fetches for tests. A test without its tool is skipped with a reason; none uses a registry."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FETCHED = Path(__file__).parents[1] / "var" / "npm"
_HOW = "`make tools` fetches it, where npm and a registry are within reach"


def kubectl() -> str:
    """A kubectl that runs on this machine: the fetched one, or the system's."""
    for found in (str(FETCHED / "kubectl") if _whole() else "", shutil.which("kubectl")):
        if found and _runs([found, "version", "--client"]):
            return found
    pytest.skip(f"there is no kubectl: {_HOW}")


def checkov() -> str:
    """Return the command of checkov, which has an environment of its own."""
    found = FETCHED.parent / "checkov"
    if not (found / ".installed").exists():
        pytest.skip("there is no checkov: `make tools` fetches it, where a package index is within reach")
    return str(found / "bin" / "checkov")


def node_modules() -> Path:
    """Return the folder in which Node finds grpc-js."""
    if not _runs(["node", "--version"]):
        pytest.skip("node is not installed")
    if not _whole():
        pytest.skip(f"there is no grpc-js: {_HOW}")
    return FETCHED / "node_modules"


def _whole() -> bool:
    return (FETCHED / ".installed").exists()


def _runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except OSError:
        return False
