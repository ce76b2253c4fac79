"""Commands whose mistakes and failures end in one line.

    exit code   meaning
    1           a failure that another try will not mend
    2           a mistake in the command, or a request that the service refuses as wrong
    69          the service does not answer
    75          the same command may succeed later: the service is busy; a training or a batch stopped before its end
    77          the token is missing, not valid, or does not allow the call

69, 75 and 77 are EX_UNAVAILABLE, EX_TEMPFAIL and EX_NOPERM of sysexits.h.
"""

from __future__ import annotations

import errno
import io
import math
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import grpc
import typer
from typer.core import TyperCommand, TyperGroup

from atspeed.batch.errors import BatchError
from atspeed.benchmarks.results import BenchmarkError
from atspeed.capacity.errors import CapacityError
from atspeed.cli.options import CommandError, err
from atspeed.engine.errors import EngineError
from atspeed.local.edge import LocalEdgeError
from atspeed.local.free_ports import PortTakenError
from atspeed.local.prometheus import LocalPrometheusError
from atspeed.local.redis_server import LocalRedisError
from atspeed.local.stack import LocalStackError
from atspeed.security.tls import TlsError
from atspeed.training.errors import Paused, TrainingError
from atspeed_client import RecommenderError, UsageError

PAUSED = 75
_CALL_EXITS = {
    grpc.StatusCode.INVALID_ARGUMENT: 2,
    grpc.StatusCode.UNAVAILABLE: 69,
    grpc.StatusCode.DEADLINE_EXCEEDED: 69,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 75,
    grpc.StatusCode.UNAUTHENTICATED: 77,
    grpc.StatusCode.PERMISSION_DENIED: 77,
}
_FORESEEN = (
    BatchError,
    BenchmarkError,
    CapacityError,
    CommandError,
    EngineError,
    LocalEdgeError,
    LocalPrometheusError,
    PortTakenError,
    LocalRedisError,
    LocalStackError,
    TlsError,
    TrainingError,
)
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


class CheckedGroup(TyperGroup):
    """Turns mistakes and foreseen failures into a line and an exit code."""

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
        except UsageError as error:
            _end(2, str(error))
        except RecommenderError as error:
            _end(_CALL_EXITS.get(error.code, 1), str(error))
        except _FORESEEN as error:
            _end(1, str(error))
        except Paused as paused:
            _end(PAUSED, f"paused: {paused}; run the same command again to continue")
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # Typer ends a command whose output is closed
            _end(1, f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except UnicodeDecodeError as error:
            _end(1, f"a file that the command reads is not UTF-8: {error.reason} at byte {error.start}")


class Commands(typer.Typer):
    """A Typer application of checked commands."""

    def __init__(self, **options: Any) -> None:
        settings = {"help_option_names": ["-h", "--help"]}
        defaults: dict[str, Any] = {
            "cls": CheckedGroup,
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
