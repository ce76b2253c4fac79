"""Commands of the README, run as they are written there on the shipped bundle."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack

ROOT = Path(__file__).parents[2]
SHOWN_ADDRESS = "127.0.0.1:50051"


@pytest.fixture(scope="module")
def readme() -> Iterator[str]:
    """Its text, with the address of services that run in place of the one that it names."""
    with LocalRedis() as redis, LocalStack(ROOT / "bundles" / "movielens-100k", redis_url=redis.url) as stack:
        yield (ROOT / "README.md").read_text(encoding="utf-8").replace(SHOWN_ADDRESS, stack.address)


def run(*command: str) -> str:
    scripts = sysconfig.get_path("scripts")
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_client(readme: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    items = r"^\[\('\d+', -\d+\.\d+\), .*\]\nTrue \d [0-9a-f]{32}$"
    assert re.search(items, run(sys.executable, "-c", code), re.MULTILINE)


def test_the_command_line_and_a_client_that_is_not_ours(readme: str) -> None:
    (address,) = set(re.findall(r"http://([\d.:]+)/atspeed", readme))
    assert "alice: " in run("atspeed", "record", "alice", "50", "172", "181", "--address", address)
    (curl,) = re.findall(r"(?m)^buf curl .*$", readme)
    assert [item["rank"] for item in json.loads(run(*shlex.split(curl)))["items"]] == [1, 2, 3]
