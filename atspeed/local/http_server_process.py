"""A server of HTTP that runs as a child process on a loopback port."""

from __future__ import annotations

import http.client
import ssl
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from atspeed.local.child_process import ChildProcess
from atspeed.local.free_ports import free_port

HOST = "127.0.0.1"
_START_SECONDS = 30.0
_STOP_SECONDS = 5.0  # then SIGKILL


class HttpServerProcess(ABC):
    """A server of a binary: a context manager. Its folder, with its configuration and data, is removed at the end.

    Attributes:
        port: the port that it listens on; before the start that of the constructor.
        log: the file of its log.
    """

    error: ClassVar[type[RuntimeError]]
    """Raised when the server does not start. The text ends with its log."""
    purpose: ClassVar[str]
    """The program, for the error about a port that is taken."""
    health_path: ClassVar[str]
    """The path that answers with 200 once the server is ready."""

    def __init__(self, binary: Path, log: Path, *, port: int, ca: Path | None = None) -> None:
        """Prepare the process without starting it.

        Args:
            port: the port that it listens on; 0 for any.
            ca: the CA of its certificate; None for HTTP without TLS.
        """
        self._binary = binary
        self._ca = ca
        self._child = ChildProcess()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.port = port
        self.log = log

    @abstractmethod
    def _options(self, folder: Path) -> Sequence[str | Path]:
        """Write the configuration into the folder. Returns the options of the binary."""

    @property
    def url(self) -> str:
        """Its address: http://127.0.0.1:<port>, or https://."""
        return f"{'https' if self._ca else 'http'}://{HOST}:{self.port}"

    @property
    def running(self) -> bool:
        """True while the process lives."""
        return self._child.running

    def start(self) -> None:
        """Start the server and wait until it answers. Raises `error`, or PortTakenError."""
        self.port = free_port(self.port, self.purpose)
        self._folder = tempfile.TemporaryDirectory(prefix=f"atspeed-{self._binary.name}-")
        try:
            command = [self._binary, *self._options(Path(self._folder.name))]
            with self.log.open("ab") as log:
                self._child.start(command, log)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if it does not end in time. Removes its folder."""
        try:
            self._child.terminate()
            self._child.wait(_STOP_SECONDS)
        finally:
            if self._folder is not None:
                self._folder.cleanup()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self.running and time.monotonic() < deadline:
            if self._is_ready():
                return
            time.sleep(0.05)
        tail = self.log.read_text(errors="replace")[-2000:].strip()
        raise self.error(f"{self._binary} did not start on port {self.port}:\n{tail}")

    def _is_ready(self) -> bool:
        connection = self._connection()  # not urllib, which asks a proxy that the environment names
        try:
            connection.request("GET", self.health_path)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._ca is None:
            return http.client.HTTPConnection(HOST, self.port, timeout=2.0)
        trust = ssl.create_default_context(cafile=self._ca)
        return http.client.HTTPSConnection(HOST, self.port, timeout=2.0, context=trust)
