"""The environment of the dry run, which every test here needs: the wheel for CUDA, on stand-ins for CUDA's libraries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda import dry_run

if dry_run.available():
    dry_run.load()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's tests in other environments."""
    if dry_run.available():
        return
    skip = pytest.mark.skip(reason="counts calls of CUDA, in an environment of its own: make cuda-tests")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def whole_device() -> Iterator[None]:
    """A device without faults and with all of its memory, whatever the test before left."""
    yield
    if dry_run.available():
        dry_run.load().dry_run_mend()
