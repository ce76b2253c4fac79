"""Write docs/settings.md from the services' settings; `--check` exits 1 when the file is not what they give."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from atspeed.configuration.settings import ServiceSettings, flag, variable

# By name: this package knows no service.
SERVICES = (
    "orchestrator.settings:OrchestratorSettings",
    "target_service.settings:TargetSettings",
    "draft_service.settings:DraftSettings",
)
PAGE = Path(__file__).parents[2] / "docs" / "settings.md"

INTRODUCTION = """\
# Settings

Written by `make settings-docs` from each service's `settings.py`; do not edit. Every setting is a command-line flag
and an environment variable. Flags win over variables, and those over defaults; an empty variable counts as not set.
A bad value, an unknown flag or an unknown variable with the service's prefix ends the start with exit code 2 and one
line that names it.
"""


def page(services: Sequence[type[ServiceSettings]]) -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(_section(service) for service in services)])


def _section(service: type[ServiceSettings]) -> str:
    rows = [_row(service, name, field) for name, field in sorted(service.model_fields.items())]
    head = ["| flag | environment variable | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([f"## {service.service}", "", *head, *rows, ""])


def _row(service: type[ServiceSettings], name: str, field: FieldInfo) -> str:
    cells = [
        f"`{flag(name)}`",
        f"`{variable(service, name)}`",
        _default(field),
        _allowed(service, name),
        " ".join((field.description or "").split()),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    return "" if text in ("", None) else f"`{text}`"


def _allowed(service: type[ServiceSettings], name: str) -> str:
    """From the JSON schema, which knows choices and bounds however they are declared."""
    schema = service.model_json_schema()["properties"][name]
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    return ", ".join(text for option in options for text in _constraints(option))


def _constraints(schema: dict[str, object]) -> Iterator[str]:
    choices = schema.get("enum")
    if isinstance(choices, list):
        yield ", ".join(f"`{choice}`" for choice in choices)
        return
    yield {"directory-path": "directory", "file-path": "file"}.get(
        str(schema.get("format")), str(schema.get("type", ""))
    )
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    yield from (f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema)


def load(reference: str) -> type[ServiceSettings]:
    """The settings that one of SERVICES names."""
    module, _, name = reference.partition(":")
    settings = getattr(importlib.import_module(module), name)
    if not (isinstance(settings, type) and issubclass(settings, ServiceSettings)):
        raise TypeError(f"{reference} is not a ServiceSettings")
    return settings


def main(arguments: Sequence[str] | None = None, path: Path = PAGE, services: Sequence[str] = SERVICES) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    text = page([load(service) for service in services])
    if not check:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{path.name} is stale, run `make settings-docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
