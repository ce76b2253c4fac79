"""The examples of the client's README, run against real services. `tests/e2e/test_readme.py` runs those of the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import LIVENESS_SECONDS, Client

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "atspeed_client" / "README.md"
EXAMPLES = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(client: Client, code: str) -> None:
    """The example as it is printed, but for the address and the item ids of the services that run here."""
    client.record("alice", ["item-1"])
    here = re.sub(r'"(\d+)"', r'"item-\1"', code.replace("127.0.0.1:50051", client.address))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", here],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=2 * LIVENESS_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "item-" in done.stdout


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3
