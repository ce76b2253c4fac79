"""Arguments of containers, as the command line of the image reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from atspeed.cli import main


def parsed(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
    secrets: Path | None = None,
) -> dict[str, Any]:
    """The options of `atspeed.cli COMMAND ...` by name. secrets: the folder that stands for /secrets; None without files."""
    module, *own = arguments
    assert module == "atspeed.cli"
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            if secrets is not None:
                patch.setenv(name, value.replace("/secrets", str(secrets)))
            elif not value.startswith("/secrets"):
                patch.setenv(name, value)
        group: Any = typer.main.get_command(main.app)
        name, command, rest = group.resolve_command(group.make_context("atspeed", own, resilient_parsing=True), own)
        with command.make_context(name, list(rest)) as context:
            given: dict[str, Any] = context.params
    return given
