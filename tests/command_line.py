"""The command line as a test runs it, in its own process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from atspeed.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main.app, [str(argument) for argument in arguments])


def one_line(result: Result) -> str:
    """The message of a foreseen failure: one line on standard error, exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr
