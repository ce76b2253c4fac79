"""The image that all services run in, and what it is pinned to."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.composed import ROOT, SCRIPTS, compose


def test_the_dockerfile_is_clean() -> None:
    command: list[str | Path] = [SCRIPTS / "hadolint", "--failure-threshold", "style", ROOT / "deploy" / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_last_stage_builds_nothing_and_runs_as_nobody() -> None:
    last = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert "pip uninstall --yes" in last
    assert not re.search(r"\binstall\b|apt-get|gcc|COPY (?!--from=build)", last.replace("uninstall", ""))


def test_the_first_process_of_a_container_is_an_init() -> None:
    """Signals that come while Python itself starts are not lost either."""
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    assert json.loads(entrypoint) == ["tini", "-s", "--", "python", "-m"]
    assert re.search(r"^COPY --from=build \S*/tini-static /usr/bin/tini$", text, re.MULTILINE)


def test_the_image_can_run_every_service() -> None:
    """`python -m NAME` for the three commands of docker-compose.yml."""
    commands = {service["command"][0] for name, service in compose()["services"].items() if name != "redis"}
    assert commands == {"draft_service", "target_service", "orchestrator"}
    for command in commands:
        assert (ROOT / command / "__main__.py").is_file()


def test_the_build_context_holds_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    kept = {
        line.lstrip("!").split("/")[0] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    }
    folders = {pattern.partition(".")[0].rstrip("*") for pattern in setuptools["packages"]["find"]["include"]}
    assert folders | {"atspeed_client", "protos"} <= kept  # the client links to the contract


@pytest.mark.parametrize("name", ["constraints.txt", "deploy/constraints-gpu.txt"])
def test_pins_are_exact_and_free_of_any_machine(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.!]+", line)] == []
    names = [line.partition("==")[0].lower() for line in lines]
    assert len(set(names)) == len(names)


def test_packages_of_npm_are_pinned_by_their_hashes_and_free_of_any_registry() -> None:
    lock = json.loads((ROOT / "tests" / "npm" / "package-lock.json").read_text(encoding="utf-8"))
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert packages
    for package in packages.values():
        assert package["integrity"].startswith("sha512-")
        assert "resolved" not in package
