"""The three services as processes of this machine, without Docker.

`atspeed up`, the demo and the tests use them. The topology is that of docker-compose.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from atspeed.local.child_process import ChildProcess

_START_SECONDS = 120.0  # loading a model of several GB
_STOP_SECONDS = 30.0  # draining; then SIGKILL
_LOG_SECONDS = 2.0  # from a closed output to the end of the process, when its log is complete
_IN_ENVIRONMENT = {"redis-url"}  # settings that may hold a password, since command lines are visible to all users


class LocalStackError(RuntimeError):
    """A service did not start. The text ends with the reason that it gave, or with the end of its log."""


def _argument(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def _first_line(source: int, until: float) -> bytes | None:
    """Read a pipe up to the first line break. None if that takes too long, or if the pipe ends before."""
    text = b""
    while (left := until - time.monotonic()) > 0:
        readable, _, _ = select.select([source], [], [], left)
        part = os.read(source, 65_536) if readable else b""
        if not part:
            return None
        text += part
        if b"\n" in text:
            return text.partition(b"\n")[0]
    return None


class ServiceProcess:
    """One service, `python -m <module>`, on a free loopback port that it keeps over restarts.

    Attributes:
        module: the service's module.
        flags: its settings by the names of their flags. Settings that may hold a secret become environment variables.
        log: the file of its standard error.
        port: the port it listens on; 0 before it runs.
        metrics_port: the port of its Prometheus metrics while it runs; None without one.
    """

    def __init__(self, module: str, flags: Mapping[str, object], log: Path) -> None:
        self.module = module
        self.flags = dict(flags)
        self.log = log
        self._child = ChildProcess()
        self.port = 0
        self.metrics_port: int | None = None

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process; None before its launch, and once it is known to have ended."""
        return self._child.process

    @property
    def address(self) -> str:
        """127.0.0.1:<port>."""
        return f"127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """True while the process lives."""
        return self._child.running

    def launch(self) -> None:
        """Start the process without waiting for it. Raises LocalStackError when it runs already."""
        if self.running:
            raise LocalStackError(f"{self.module}: is running already")
        flags = {"log-format": "json", **self.flags, "port": self.port}
        arguments = [_argument(name, value) for name, value in flags.items() if name not in _IN_ENVIRONMENT]
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", self.module, *arguments]
            self._child.start(command, log, announces=True, environment=self._variables())

    def _variables(self) -> dict[str, str]:
        """Return the settings that the process gets by its environment."""
        prefix = f"ATSPEED_{self.module.removesuffix('_service')}_"
        return {
            f"{prefix}{name}".replace("-", "_").upper(): str(value)
            for name, value in self.flags.items()
            if name in _IN_ENVIRONMENT
        }

    def wait_ready(self) -> None:
        """Wait until the service takes calls. If an error is raised, the process has been killed.

        Raises LocalStackError when it ends, prints something else than its address, or takes too long.
        """
        with ExitStack() as undo:
            undo.callback(self.kill)
            announced = self._announced(time.monotonic() + _START_SECONDS)
            try:
                self.port = int(announced["port"])
                self.metrics_port = announced.get("metrics_port")
            except (KeyError, TypeError, ValueError):
                raise LocalStackError(f"{self.module}: did not start: it did not print its address") from None
            undo.pop_all()

    def start(self) -> None:
        """Launch the process and wait until it takes calls."""
        self.launch()
        self.wait_ready()

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if it does not drain in time."""
        self.terminate()
        self.wait_stopped()

    def terminate(self) -> None:
        """Send SIGTERM without waiting for it to drain."""
        self._child.terminate()

    def wait_stopped(self) -> None:
        """Wait for a draining process. SIGKILL follows after a time, or when waiting is interrupted."""
        self._child.wait(_STOP_SECONDS)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._child.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _announced(self, until: float) -> Any:
        """Read the JSON line that a service prints once it takes calls."""
        process = self.process
        if process is None or process.stdout is None:
            raise LocalStackError(f"{self.module}: not launched")
        line = _first_line(process.stdout.fileno(), until)
        if line is None:
            # A process that ends closes its output first; its log is complete when it has ended.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOG_SECONDS)
            raise LocalStackError(f"{self.module}: did not start{self._why()}")
        try:
            return json.loads(line)
        except ValueError:
            raise LocalStackError(f"{self.module}: did not start: it did not print its address") from None

    def _why(self) -> str:
        """Return the reason that the service gave, as one line; without one, the end of its log."""
        tail = self.log.read_text(errors="replace")[-2000:].strip() if self.log.exists() else ""
        last = tail.rpartition("\n")[2]
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return f": {json.loads(last)['reason']}"
        return f"\n{tail}" if "\n" in tail else f": {tail}"


class LocalStack:
    """Draft, targets and orchestrator of one bundle: a context manager that starts them and drains them in order.

    Raises LocalStackError when a service does not start; the others are then stopped.
    """

    def __init__(
        self,
        bundle: Path | str,
        *,
        redis_url: str | None = None,
        drafts: int = 1,
        targets: int = 1,
        orchestrators: int = 1,
        log_folder: Path | None = None,
        port: int = 0,
        flags: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        """Prepare the services without starting them.

        Args:
            bundle: the bundle to serve: a folder, a link or a URL.
            redis_url: the URL of Redis; None without one.
            drafts: draft replicas.
            targets: target replicas.
            orchestrators: orchestrator replicas.
            log_folder: the folder of the logs; a temporary one by default.
            port: the port of the first orchestrator; 0 for any.
            flags: more settings by service (`draft`, `target`, `orchestrator`).
        """
        self._cleanup = ExitStack()
        self.log_folder = log_folder or Path(self._cleanup.enter_context(tempfile.TemporaryDirectory()))
        self._redis_url = redis_url
        self._flags = flags or {}
        # A path is not resolved, since the services follow a link.
        self._bundle = bundle.absolute() if isinstance(bundle, Path) else bundle
        # Models slow each other down when together they have more threads than there are cores.
        self._threads = max(1, (os.cpu_count() or 1) // max(1, drafts + targets))
        self.drafts = [self._service("draft", "draft_service", n) for n in range(drafts)]
        self.targets = [self._service("target", "target_service", n) for n in range(targets)]
        self.orchestrators = [self._service("orchestrator", "orchestrator", n) for n in range(orchestrators)]
        if port:
            self.orchestrators[0].port = port

    @property
    def services(self) -> Sequence[ServiceProcess]:
        """Processes of all services, in the order in which they start."""
        return [*self.drafts, *self.targets, *self.orchestrators]

    @property
    def address(self) -> str:
        """The address of the first orchestrator."""
        return self.orchestrators[0].address

    def start(self) -> None:
        """Start the models side by side, then the orchestrators with the models' addresses."""
        try:
            self._start([*self.drafts, *self.targets])
            for orchestrator in self.orchestrators:
                orchestrator.flags["target"] = ",".join(target.address for target in self.targets)
                if self.drafts:
                    orchestrator.flags["draft"] = ",".join(draft.address for draft in self.drafts)
            self._start(self.orchestrators)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Drain the orchestrators side by side, then the models, which they call.

        If that fails or is interrupted, remaining processes are killed.
        """
        with ExitStack() as ends:
            ends.callback(self._cleanup.close)
            for service in self.services:
                ends.callback(service.kill)
            for services in (self.orchestrators, [*self.drafts, *self.targets]):
                for service in services:
                    service.terminate()
                for service in services:
                    service.wait_stopped()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, services: Sequence[ServiceProcess]) -> None:
        for service in services:
            service.launch()
        for service in services:
            service.wait_ready()

    def _service(self, name: str, module: str, number: int) -> ServiceProcess:
        flags: dict[str, object] = {"bundle": self._bundle, **self._flags.get(name, {})}
        if module != "orchestrator":
            flags.setdefault("threads", self._threads)
        if self._redis_url:
            flags.setdefault("redis-url", self._redis_url)
        return ServiceProcess(module, flags, self.log_folder / f"{name}-{number}.log")
