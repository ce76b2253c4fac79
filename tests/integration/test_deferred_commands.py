"""The command line loads the command that is called, and no other."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from typer.main import get_command

from atspeed.cli.commands import DeferredCommand
from atspeed.cli.main import app
from tests.command_line import ROOT

HEAVY = (
    "confluent_kafka",
    "grpc",
    "numpy",
    "onnx",
    "onnxruntime",
    "pandas",
    "pyarrow",
    "redis",
    "scipy",
    "torch",
    "transformers",
)
MOST_MODULES = 500  # 425, those of typer and rich; with every command 1,050


def _deferred() -> list[DeferredCommand]:
    found = list[DeferredCommand]()
    groups: list[Any] = [get_command(app)]
    while groups:
        for command in getattr(groups.pop(), "commands", {}).values():
            if isinstance(command, DeferredCommand):
                found.append(command)
                groups.append(command.load())
    return found


def test_summaries_are_the_help_of_the_commands() -> None:
    commands = _deferred()
    assert len(commands) > 30
    for command in commands:
        loaded = command.load()
        assert (command.name, command.help) == (loaded.name, loaded.help.split("\n\n")[0])


def _leaves(command: Any, path: str = "") -> dict[str, Any]:
    """Return the commands that are no groups, by their words."""
    loaded = command.load() if isinstance(command, DeferredCommand) else command
    below = getattr(loaded, "commands", None)
    if below is None:
        return {path.strip(): loaded}
    return {name: leaf for word, one in below.items() for name, leaf in _leaves(one, f"{path} {word}").items()}


def test_every_command_with_a_result_prints_it_as_json() -> None:
    without = {
        name for name, leaf in _leaves(get_command(app)).items() if not any("--json" in one.opts for one in leaf.params)
    }
    # Services write logs as JSON, a report is a page, and `gpu-lists` always writes a result file.
    assert without == {"up", "consume-events", "bench report", "bench gpu-lists"}


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["bench", "--help"], set()),
        (["recommend", "--help"], {"grpc"}),
        (["train", "--help"], {"numpy"}),
        (["bench", "report", "--help"], {"numpy"}),
    ],
)
def test_help_imports_no_heavy_package(arguments: list[str], allowed: set[str]) -> None:
    program = (
        "import sys\n"
        "from atspeed.cli.main import app\n"
        f"app({arguments}, standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    modules = set(ran.stderr.split())
    assert modules.intersection(HEAVY) <= allowed
    if not allowed:
        assert len(modules) <= MOST_MODULES
