"""The command line as a test runs it: in the test's process, or `atspeed up` as a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from typer.testing import CliRunner, Result

from atspeed.cli import main

ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main.app, [str(argument) for argument in arguments])


def one_line(result: Result, code: int = 1) -> str:
    """The message of a foreseen failure: one line on standard error, no traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


class started:  # noqa: N801 - reads as a verb
    """`atspeed up` as a process that does not outlive the block. path: where it looks for programs."""

    def __init__(self, *arguments: object, path: Path | None = None) -> None:
        self.command = [sys.executable, "-m", "atspeed.cli", "up", *map(str, arguments)]
        self.changed = {"PATH": str(path)} if path else {}

    def __enter__(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"} | self.changed
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return self.process

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.communicate(timeout=60)
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def read_line(process: subprocess.Popen[str], seconds: float = 120.0) -> str:
    """The next line of a process's output. A process that says nothing for so long is killed."""
    assert process.stdout is not None
    # Not by select: a second line may have come with the first one, and is then in the buffer.
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        return process.stdout.readline()
    finally:
        timer.cancel()


def alive(number: int) -> bool:
    """Return whether a process runs. A zombie does not."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True
