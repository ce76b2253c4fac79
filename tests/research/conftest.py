"""Fixtures of the studies' tests."""

from __future__ import annotations

from tests.training.conftest import one_torch_thread

__all__ = ["one_torch_thread"]
