"""Devices that run a model, as options name them."""

from __future__ import annotations

from typing import Literal

Provider = Literal["cpu", "cuda"]
