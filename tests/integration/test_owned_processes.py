"""Processes that we start: none of them, and no pipe of theirs, is left behind, however a start or an end goes.

The services here are a stand-in that does what its environment says; what is looked at are this process's own children.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import atspeed.local.child_process
import atspeed.local.redis_server
import atspeed.local.stack
from atspeed.local.child_process import ParentWatch
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack, LocalStackError, ServiceProcess
from tests.serving import until

STAND_IN = """
import json, os, signal, sys, time

def tell_parent(*_):
    os.kill(os.getppid(), signal.SIGINT)

name = os.path.basename(sys.argv[0]).removesuffix(".py")
does = os.environ.get(f"STAND_IN_{name.upper()}", "serves")
announced = json.dumps({"port": 1}) + "\\n"
if does == "dies":
    sys.exit("out of memory")
if does == "says half a line and dies":
    sys.stdout.write(announced[:5])
    sys.exit(1)
if does == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if does == "says half a line":
    sys.stdout.write(announced[:5])
elif does == "says something else":
    print("hello")
elif does == "says another kind of thing":
    print("[1]")
elif does == "says no port":
    print("{}")
elif does == "closes its output":
    os.close(1)
elif does == "interrupts":
    tell_parent()
elif does != "says nothing":
    if does == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if does == "interrupts when it is to end":
        signal.signal(signal.SIGTERM, tell_parent)
    sys.stdout.write(announced)
sys.stdout.flush() if does != "closes its output" else None
time.sleep(600)
"""
DYING = ["dies", "is killed", "says half a line and dies"]
LYING = ["says something else", "says another kind of thing", "says no port"]
HANGING = ["says half a line", "says nothing", "closes its output"]


def children() -> set[int]:
    """Child processes of this one, zombies included."""
    own = Path(f"/proc/{os.getpid()}/task")
    return {int(n) for task in own.iterdir() for n in (task / "children").read_text(encoding="ascii").split()}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No child more than before, and no descriptor. What Python itself finds forgotten is a warning, and so an error."""
    processes, files = children(), len(list(Path("/proc/self/fd").iterdir()))
    yield
    gc.collect()
    assert children() == processes
    assert len(list(Path("/proc/self/fd").iterdir())) <= files  # a file of an earlier test may be closed meanwhile


@pytest.fixture(autouse=True)
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draft_service", "target_service", "orchestrator"):
        (tmp_path / f"{name}.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)  # `-m` looks here first


@pytest.fixture
def does(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Say what a stand-in does."""
    return lambda name, what: monkeypatch.setenv(f"STAND_IN_{name.upper()}", what)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atspeed.local.stack, "_START_SECONDS", 1.0)
    monkeypatch.setattr(atspeed.local.stack, "_LOG_SECONDS", 0.2)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    service = ServiceProcess("target_service", {}, tmp_path / "log")
    yield service
    service.kill()


def new_stack(folder: Path) -> LocalStack:
    return LocalStack(folder, log_folder=folder, drafts=1, targets=2)


class TestAStartThatFails:
    @pytest.mark.parametrize("what", [*DYING, *LYING])
    def test_of_a_service(self, service: ServiceProcess, does: Callable[[str, str], None], what: str) -> None:
        does("target_service", what)
        with pytest.raises(LocalStackError, match=r"^target_service: did not start"):
            service.start()
        assert service.process is None
        does("target_service", "serves")
        service.start()
        assert service.running

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("what", HANGING)
    def test_of_a_service_that_hangs(
        self, service: ServiceProcess, does: Callable[[str, str], None], what: str
    ) -> None:
        does("target_service", what)
        with pytest.raises(LocalStackError, match=r"^target_service: did not start"):
            service.start()
        assert service.process is None

    @pytest.mark.parametrize("what", ["dies", "says something else"])
    @pytest.mark.parametrize("name", ["draft_service", "target_service", "orchestrator"])
    def test_of_one_of_several(self, tmp_path: Path, does: Callable[[str, str], None], name: str, what: str) -> None:
        does(name, what)
        stack = new_stack(tmp_path)
        with pytest.raises(LocalStackError, match=f"^{name}: did not start"):
            stack.start()
        assert [service.process for service in stack.services] == [None] * 4


def test_service_that_fails_to_start_reports_its_reason(
    service: ServiceProcess, does: Callable[[str, str], None]
) -> None:
    does("target_service", "dies")
    with pytest.raises(LocalStackError, match="out of memory"):
        service.start()


@pytest.mark.parametrize("name", ["draft_service", "target_service", "orchestrator"])
def test_interrupted_start_of_a_stack_leaves_no_process(
    tmp_path: Path, does: Callable[[str, str], None], name: str
) -> None:
    """Ctrl-C during the wait for one of them: all have ended when the caller gets the exception."""
    does(name, "interrupts")
    stack = new_stack(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stack.start()
    assert [service.process for service in stack.services] == [None] * 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_signal_between_a_process_and_its_watch_finds_both_owned(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    class Interrupted(ParentWatch):
        def __init__(self, pid: int) -> None:
            if when == "before":
                signal.raise_signal(signal.SIGINT)
            super().__init__(pid)
            if when == "after":
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(atspeed.local.child_process, "ParentWatch", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        service.start()
    assert service.running
    service.kill()
    assert not service.running


def test_a_process_that_cannot_be_watched_is_not_kept(service: ServiceProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_pid: int) -> ParentWatch:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(atspeed.local.child_process, "ParentWatch", full)
    with pytest.raises(BlockingIOError):
        service.start()
    assert service.process is None


@pytest.mark.parametrize("asked", [True, False])
def test_service_that_crashed_is_replaced(service: ServiceProcess, asked: bool) -> None:
    """Its watcher and its pipe go with it, whether or not anybody has asked in between if it runs."""
    for _ in range(3):
        service.start()
        process = service.process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        if asked:
            until(lambda: not service.running)
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    service.start()
    assert service.running


def test_a_service_that_runs_is_not_started_twice(service: ServiceProcess) -> None:
    service.start()
    process = service.process
    with pytest.raises(LocalStackError, match="target_service: is running already"):
        service.start()
    assert service.process is process
    assert service.running


@pytest.mark.parametrize("ending", [ServiceProcess.stop, ServiceProcess.kill, ServiceProcess.wait_stopped])
def test_stop_of_a_process_that_has_just_died_has_no_effect(
    service: ServiceProcess, ending: Callable[[ServiceProcess], None]
) -> None:
    service.start()
    assert service.process is not None
    os.kill(service.process.pid, signal.SIGKILL)
    ending(service)
    ending(service)
    assert service.process is None


@pytest.mark.parametrize("name", ["draft_service", "target_service", "orchestrator"])
def test_a_service_that_does_not_end_in_time_is_killed(
    tmp_path: Path, does: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(atspeed.local.stack, "_STOP_SECONDS", 0.2)
    does(name, "ignores SIGTERM")
    with new_stack(tmp_path) as stack:
        assert all(service.running for service in stack.services)
    assert [service.process for service in stack.services] == [None] * 4


@pytest.mark.parametrize("name", ["draft_service", "target_service", "orchestrator"])
def test_interrupted_stop_leaves_no_process(tmp_path: Path, does: Callable[[str, str], None], name: str) -> None:
    """Ctrl-C during the wait for a drain ends the wait, and all have ended."""
    does(name, "interrupts when it is to end")
    stack = new_stack(tmp_path)
    stack.start()
    with pytest.raises(KeyboardInterrupt):
        stack.stop()
    assert [service.process for service in stack.services] == [None] * 4


def test_a_paused_service_ends_in_order(service: ServiceProcess) -> None:
    service.start()
    process = service.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    service.terminate()
    assert process.wait(60) == -signal.SIGTERM
    service.wait_stopped()


class TestRedis:
    def test_whose_start_is_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is given up, and can be started another time."""
        server, answers = LocalRedis(), atspeed.local.redis_server._answers_as

        def interrupted(port: int, pid: int) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(atspeed.local.redis_server, "_answers_as", interrupted)
        with pytest.raises(KeyboardInterrupt), server:
            pass
        assert not server.running
        monkeypatch.setattr(atspeed.local.redis_server, "_answers_as", answers)
        with server:
            assert server.running

    def test_that_died_by_itself(self) -> None:
        server = LocalRedis()
        for _ in range(2):
            server.start()
            process = server._server.process
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            until(lambda: not server.running)
        server.stop()

    def test_that_is_paused_when_it_is_to_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In order, not by SIGKILL after seconds."""
        with LocalRedis() as server:
            process = server._server.process
            assert process is not None
            server.pause()
        assert process.returncode == 0

    def test_whose_stop_is_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """SIGKILL replaces a graceful stop without a wait."""
        server = LocalRedis()
        server.start()
        process = server._server.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        waits = process.wait

        def interrupted(timeout: float | None = None) -> int:
            if timeout is not None:
                raise KeyboardInterrupt
            return waits()

        monkeypatch.setattr(process, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.stop()
        assert process.poll() is not None
        assert not server.running
