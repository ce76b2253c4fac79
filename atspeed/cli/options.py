"""What all commands of the command line have: their options, their failure, their consoles, and modules of an extra."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

MAX_SEED = 2**31 - 1
"""Largest seed that every library of training and benchmarks takes."""
MAX_USERS = 10_000_000
MAX_WIDTH = 4_096
"""Largest beam width that a service may be set to allow."""
MAX_EXCLUDED = 10_000_000
MAX_REPLICAS = 64
MAX_THREADS = 256
MAX_MINUTES = 525_600  # a year

BundleFolder = Annotated[Path, typer.Option("--bundle", help="Directory of the bundle.", exists=True, file_okay=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the reply as JSON.")]

out, err = Console(), Console(stderr=True)

# Which extra brings a package that a command may lack.
_EXTRAS = {"gguf": "base-models", "matplotlib": "bench", "onnxruntime_genai": "bench", "trustme": "local"}
_OURS = {"atspeed", "draft_service", "orchestrator", "research", "target_service"}


def warn(text: str) -> None:
    """Say on standard error what a user should know of an answer."""
    err.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


class CommandError(Exception):
    """A command that cannot do what it was asked. The text is one line."""


def optional(module: str) -> Any:
    """A module that needs what an extra installs. Raises CommandError naming the extra when it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        if package in _OURS:
            raise
        extra = _EXTRAS.get(package, "train")
        raise CommandError(f"{package} is not installed: pip install 'atspeed-serving[{extra}]'") from None
