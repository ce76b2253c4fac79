"""Writes docs/settings.md from the services' settings. `--check` compares."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from atspeed.configuration.generated_page import write_or_check
from atspeed.configuration.settings import ServiceSettings, flag, variable

# Names instead of imports: this package must not import a service.
SERVICES = (
    "orchestrator.settings:OrchestratorSettings",
    "target_service.settings:TargetSettings",
    "draft_service.settings:DraftSettings",
)
PAGE = Path(__file__).parents[2] / "docs" / "settings.md"

INTRODUCTION = """\
# Settings

`make settings-docs` writes this page from each service's `settings.py`; do not edit it.
Every setting is a command-line flag and an environment variable.
Flags win over variables, and those over defaults. An empty variable counts as not set.
A bad value, an unknown flag or an unknown variable with the service's prefix ends the start with exit code 2 and one line
that names it.
The essential settings are those that operators change. The advanced ones rarely need a change.
"""


def page(services: Sequence[type[ServiceSettings]]) -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    for title, essential in (("Essential settings", True), ("Advanced settings", False)):
        parts += [f"## {title}\n", *(_section(service, essential=essential) for service in services)]
    return "\n".join(parts)


def _section(service: type[ServiceSettings], *, essential: bool) -> str:
    fields = sorted(service.model_fields.items())
    rows = [_row(service, name, field) for name, field in fields if (name in service.essential) is essential]
    head = ["| flag | environment variable | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([f"### {service.service}", "", *head, *rows, ""])


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
    """Return the allowed values, from the JSON schema, which has all choices and bounds."""
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
    """Import one of SERVICES."""
    module, _, name = reference.partition(":")
    settings = getattr(importlib.import_module(module), name)
    if not (isinstance(settings, type) and issubclass(settings, ServiceSettings)):
        raise TypeError(f"{reference} is not a ServiceSettings")
    return settings


def main(arguments: Sequence[str] | None = None, path: Path = PAGE, services: Sequence[str] = SERVICES) -> int:
    """Write the page, or check it."""
    text = page([load(service) for service in services])
    return write_or_check(path, text, "make settings-docs", arguments)


if __name__ == "__main__":
    sys.exit(main())
