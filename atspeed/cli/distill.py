"""`atspeed distill`: a draft for the target of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atspeed.cli.options import MAX_MINUTES, MAX_THREADS, optional
from atspeed.engine.bundle.manifest import Bundle

