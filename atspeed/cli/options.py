"""Options, errors and consoles that all commands share, and modules of extras."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

MAX_SEED = 2**31 - 1
"""Largest seed that all libraries of training and benchmarks accept."""
MAX_USERS = 10_000_000  # more than any data set has; catches typing errors
MAX_WIDTH = 4_096
"""Largest beam width that the services' settings allow."""
MAX_EXCLUDED = 10_000_000  # likewise, for catalogues
MAX_REPLICAS = 64  # on one machine; catches typing errors
MAX_THREADS = 256  # likewise
MAX_MINUTES = 525_600  # a year

BundleFolder = Annotated[Path, typer.Option("--bundle", help="Directory of the bundle.", exists=True, file_okay=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_THREADS, help="CPU threads; all cores by default. Another number rounds differently."),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=MAX_MINUTES,
        help="Stop after so many minutes with exit code 75 and keep everything; the same command continues.",
    ),
]
CheckpointMinutes = Annotated[
    float, typer.Option(min=0, max=MAX_MINUTES, help="Minutes between two saved states inside an epoch.")
]

out, err = Console(), Console(stderr=True)

# The extra that installs a package; all other packages belong to `train`.
_EXTRAS = {
    "confluent_kafka": "kafka",
    "gguf": "base-models",
    "matplotlib": "bench",
    "onnxruntime_genai": "bench",
    "trustme": "local",
}
_OURS = {"atspeed", "draft_service", "orchestrator", "research", "target_service"}


def warn(text: str) -> None:
    """Print a warning about an answer on standard error."""
    err.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_result(text: str, fields: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the result of a command: a text, or its fields as one JSON object. Paths become strings."""
    print(json.dumps(fields, default=str, ensure_ascii=False) if as_json else text)


def named_values(option: str, given: Sequence[str]) -> dict[str, str]:
    """Split texts NAME=VALUE. Raises typer.BadParameter that names the option."""
    found = dict[str, str]()
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value) or name in found:
            problem = "is given twice" if name in found else "is not NAME=VALUE"
            raise typer.BadParameter(f"{option}: {text[:60]!r} {problem}")
        found[name] = value
    return found


class CommandError(Exception):
    """A command that cannot be carried out. The text is one line."""


def optional(module: str) -> Any:
    """Import a module of an extra. Raises CommandError naming the extra if a package is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        if package in _OURS:
            raise
        extra = _EXTRAS.get(package, "train")
        raise CommandError(f"{package} is not installed: pip install 'atspeed-serving[{extra}]'") from None
