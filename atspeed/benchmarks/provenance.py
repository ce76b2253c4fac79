"""Provenance of a result: the header of every result file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atspeed.engine.bundle.bundle import Bundle

_PACKAGES = (
    "atspeed-serving",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "grpcio",
    "numpy",
    "redis",
    "torch",
    "transformers",
)


def provenance(
    bundle: Bundle | None, *, seed: int | None = None, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return command, seed, revision, bundle, versions and machine as JSON values. command: this process's by default."""
    arguments = list(sys.argv if command is None else command)
    return {
        "created_at": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "command": [*_program(Path(arguments[0])), *arguments[1:]],
        "seed": seed,
        "revision": revision(),
        "bundle": _bundle(bundle) if bundle else None,
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": _machine(),
    }


def _program(path: Path) -> list[str]:
    """Return the beginning of the command: the name of a script, or `python -m PACKAGE` for a package."""
    return ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]


def _bundle(bundle: Bundle) -> Mapping[str, Any]:
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "scoring_rule": str(manifest.scoring_rule),
        "catalogue": manifest.catalogue_version,
        "parameters": {role: model.parameters for role, model in manifest.models.items()},
        "precision": {role: model.precision for role, model in manifest.models.items()},
        "inflated_from": {
            role: model.inflated_from for role, model in manifest.models.items() if model.inflated_from is not None
        },
    }


def _versions() -> Mapping[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> Mapping[str, str | int | None]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _processor() -> str:
    """Return the processor's name. Linux keeps it in a file that other systems do not have."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def revision() -> str | None:
    """Return the commit of this code, with a `+` where files differ from it; None outside a git checkout."""
    git, root = shutil.which("git"), Path(__file__).parents[2]
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed command
    return done.stdout.strip() or None
