"""Services and commands as a container's first process, for which the kernel drops every signal that has no handler."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving import LIVENESS_SECONDS, until

ROOT = Path(__file__).parents[2]
SERVICES = ["draft_service", "target_service", "orchestrator"]
HOLDER = """
import time
from atspeed.local.redis_server import LocalRedis
from atspeed.concurrency.early_signals import unwind_at_sigterm

unwind_at_sigterm()
with LocalRedis() as server:
    print(server.url, flush=True)
    time.sleep(600)
"""


@functools.cache
def unshared() -> list[str]:
    """The command whose child is the first process of its own process namespace."""
    command = [shutil.which("unshare") or "unshare", "--pid", "--fork"]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("unshare --pid is not permitted here")
    return command


@dataclass
class First:
    """A first process. outer: the one that made its namespace, which ends as it does. number: its id out here."""

    outer: subprocess.Popen[str]
    number: int

    @property
    def handles_sigterm(self) -> bool:
        status = Path(f"/proc/{self.number}/status").read_text(encoding="ascii")
        (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
        return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)

    @property
    def has_loaded_grpc(self) -> bool:
        return "cygrpc" in Path(f"/proc/{self.number}/maps").read_text(encoding="utf-8")

    def ended(self) -> tuple[int, str]:
        """Exit code and what it printed on stdout."""
        output, _ = self.outer.communicate(timeout=LIVENESS_SECONDS)
        return self.outer.returncode, output


@contextmanager
def first_process(*arguments: str) -> Iterator[First]:
    """Python with these arguments, which does not outlive the block."""
    outer = subprocess.Popen(
        [*unshared(), sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    with outer:
        try:
            until(lambda: children.read_text(encoding="ascii") != "", pause=0)
            first = First(outer, int(children.read_text(encoding="ascii").split()[0]))
            yield first
        finally:
            if outer.poll() is None:
                for number in children.read_text(encoding="ascii").split():
                    os.kill(int(number), signal.SIGKILL)
                outer.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("module", [*SERVICES, "atspeed.cli"])
def test_a_first_process_ends_at_a_signal_before_anything_heavy_is_loaded(
    bundle: Path, module: str, number: signal.Signals
) -> None:
    """Its handler is there before the imports, which take a second; it prints nothing, as it never served."""
    command = ["up"] if module == "atspeed.cli" else []
    with first_process("-m", module, *command, "--bundle", str(bundle)) as process:
        until(lambda: process.handles_sigterm, pause=0.001)
        assert not process.has_loaded_grpc
        os.kill(process.number, number)
        assert process.ended() == (0, "")


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.7, 1.5])
@pytest.mark.parametrize("module", SERVICES)
def test_a_first_process_ends_at_a_signal_whatever_it_is_at(bundle: Path, module: str, seconds: float) -> None:
    """In the middle of its imports, of reading its settings, of loading a model, or serving."""
    needed = ["--target", "127.0.0.1:1"] if module == "orchestrator" else []
    with first_process("-m", module, "--bundle", str(bundle), "--port", "0", *needed) as process:
        until(lambda: process.handles_sigterm, pause=0.001)
        time.sleep(seconds)
        os.kill(process.number, signal.SIGTERM)
        code, _ = process.ended()
    assert code == 0


def test_a_first_process_that_runs_services_stops_them_at_sigterm() -> None:
    """The exit code names the signal, and resources are released in order, as by a benchmark or the demo."""
    with first_process("-c", HOLDER) as process:
        assert process.outer.stdout is not None
        assert process.outer.stdout.readline().startswith("redis://")
        os.kill(process.number, signal.SIGTERM)
        assert process.ended() == (128 + signal.SIGTERM, "")


def test_loading_command_names_the_signal_that_ended_it(bundle: Path) -> None:
    """A complete command: one that lacks its bundle would end by itself, now and then before the signal."""
    command = ("bench", "lossless", "--bundle", str(bundle), "--users", "1000")
    with first_process("-m", "atspeed.cli", *command) as process:
        until(lambda: process.handles_sigterm, pause=0.001)
        os.kill(process.number, signal.SIGTERM)
        assert process.ended() == (128 + signal.SIGTERM, "")


def test_import_that_drops_exceptions_does_not_keep_a_process_alive(tmp_path: Path) -> None:
    """The callbacks by which an import releases its locks drop exceptions too."""
    (tmp_path / "dropping.py").write_text(
        "import contextlib, os, signal\n"
        "with contextlib.suppress(BaseException):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signal.pause()\n"
    )
    held = (
        "import sys; from atspeed.concurrency.early_signals import unwind_at_sigterm; unwind_at_sigterm(); "
        f"sys.path.insert(0, {str(tmp_path)!r}); import dropping; print('lost')"
    )
    done = subprocess.run([sys.executable, "-c", held], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
