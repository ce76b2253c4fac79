"""Commands of `atspeed`: loaded when called; a failure prints one line."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, ClassVar, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from atspeed.cli.options import CommandError, err

# The base of all usage errors, which Typer does not export.
_Mistake: type[Any] = typer.BadParameter.__base__ or typer.BadParameter


class CheckedCommand(TyperCommand):
    """A command that accepts only UTF-8 text and finite numbers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check the values of all options."""
        rest = super().parse_args(ctx, args)
        parameter: Any
        for parameter in self.params:
            for value in _values(ctx.params.get(parameter.name or "")):
                if problem := _problem(value):
                    raise typer.BadParameter(problem, ctx=ctx, param=parameter)
        return rest


class DeferredCommand(TyperCommand):
    """A command that is imported when it is called: help pages need its name and summary only.

    Args:
        name: the name.
        place: MODULE:NAME of its function, or of the `Commands` of a group.
        summary: the first paragraph of its help.
    """

    def __init__(self, name: str, place: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self._place = place

    def imported(self) -> Any:
        """Import the function, or the `Commands` of a group."""
        module, _, attribute = self._place.partition(":")
        return getattr(import_module(module), attribute)

    def load(self) -> Any:
        """Import and return the command or the group."""
        found = self.imported()
        if isinstance(found, Commands):
            group = get_group(found)
            group.name = self.name
            return group
        commands = Commands()
        commands.command(self.name)(found)
        return get_command(commands)


class CheckedGroup(TyperGroup):
    """Turns mistakes and expected failures into a line and an exit code.

    Attributes:
        deferred: commands that are loaded when they are called.
    """

    deferred: ClassVar[tuple[DeferredCommand, ...]] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for command in self.deferred:
            self.add_command(command)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal's encoding may lack a letter of an id
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except _Mistake as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                raise  # a group without a command shows its help
            _end(2, f"{error.format_message().rstrip('.')}; see {error.ctx.command_path} --help")
        except CommandError as error:
            _end(1, str(error))
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            from atspeed.cli.failures import exit_code_and_line  # loads all packages

            if (known := exit_code_and_line(error)) is None:
                raise
            _end(*known)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the name, the command and the rest of the arguments. A deferred command is loaded."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, DeferredCommand) else command, rest


class Commands(typer.Typer):
    """A Typer application of checked commands.

    deferred: commands that are loaded when they are called.
    """

    def __init__(self, *deferred: DeferredCommand, **options: Any) -> None:
        self.deferred = deferred
        settings = {"help_option_names": ["-h", "--help"]}
        defaults: dict[str, Any] = {
            "cls": type("Group", (CheckedGroup,), {"deferred": deferred}),
            "no_args_is_help": True,
            "add_completion": False,
            "context_settings": settings,
        }
        super().__init__(**defaults | options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """Register a command."""
        return super().command(name, **{"cls": CheckedCommand, **options})


def _end(code: int, line: str) -> NoReturn:
    shown = re.sub(r"\s*[\r\n]\s*", " ", line)  # Typer puts each choice on a line, behind a tab
    err.print(f"atspeed: {shown}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code) from None


def _values(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _problem(value: Any) -> str:
    """Return the reason why no option can have this value; empty if one can."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number."
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{value!a} is not UTF-8."
    return ""
