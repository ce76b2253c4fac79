"""deploy/gpu-setup.sh: what it installs, asked of pip's resolver, for the Python that machines with a GPU often have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "deploy" / "gpu-setup.sh").read_text(encoding="utf-8")


def extras() -> list[str]:
    """The extras that the script installs."""
    (names,) = re.findall(r"--editable '\.\[([\w,-]+)\]'", SCRIPT)
    return str(names).split(",")


def pins() -> dict[str, str]:
    lines = (ROOT / "deploy" / "constraints-gpu.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_script_is_one_of_the_shell() -> None:
    subprocess.run(["sh", "-n", ROOT / "deploy" / "gpu-setup.sh"], check=True)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_its_packages_resolve(tmp_path: Path) -> None:
    """It could not install once: its pins contradicted those of torch. A package index is needed, and minutes."""
    client, project = (
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for folder in ("atspeed_client", "")
    )
    wanted = tmp_path / "requirements.txt"
    needed = [*client["dependencies"], *project["dependencies"]]
    needed += [one for extra in extras() for one in project["optional-dependencies"][extra]]
    needed = [one for one in needed if not one.startswith(client["name"])]  # it comes from its folder
    wanted.write_text("\n".join(needed), encoding="utf-8")
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", str(report)]
    # --target: pip resolves for another Python only where it installs nothing into this one.
    command += ["--python-version", "3.12", "--only-binary", ":all:", "--target", str(tmp_path / "none")]
    for constraints in ("constraints.txt", "deploy/constraints-gpu.txt"):
        command += ["--constraint", str(ROOT / constraints)]
    done = subprocess.run([*command, "--requirement", str(wanted)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    packages = [found["metadata"] for found in json.loads(report.read_text())["install"]]
    versions = {package["name"].lower(): package["version"] for package in packages}
    assert versions.keys() >= {"torch", "transformers", "onnx", "grpcio"}
    # Every pin is of something that is installed, and the wheel for the CPU does not hide the one for the GPU.
    assert {name: versions.get(name) for name in pins()} == pins()
    assert "onnxruntime" not in versions
