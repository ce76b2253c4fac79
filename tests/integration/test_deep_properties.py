"""The unit tests' properties and laws again, with many examples and all draws (`tests/profiles.py`): `make faults`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.profiles import DEEP

ROOT = Path(__file__).parents[2]
# The laws of the policies take as long as all the others.
PARTS = [
    ["tests/statistics"],
    ["tests/unit/search"],
    ["tests/unit", "--ignore=tests/unit/search"],
]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", PARTS, ids=["laws", "search", "others"])
def test_properties_hold_for_many_examples(part: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--hypothesis-profile", DEEP]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, *part], cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
