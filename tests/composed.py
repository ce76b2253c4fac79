"""Configuration that docker-compose makes of the project's files."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))  # docker-compose and hadolint come as wheels, beside this Python
SECURE_FILES = ("-f", "docker-compose.yml", "-f", "deploy/docker-compose.secure.yml")

Service = dict[str, Any]


def compose(*arguments: str, **variables: str) -> dict[str, Any]:
    """`docker compose config` as it comes out with these arguments and variables."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    command: list[str | Path] = [SCRIPTS / "docker-compose", *arguments, "config", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    config: dict[str, Any] = json.loads(done.stdout)
    return config
