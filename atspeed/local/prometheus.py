"""A Prometheus on this machine, with the project's alert rules.

`atspeed up --metrics` uses it where the binary `prometheus` is on the PATH.
"""

from __future__ import annotations

import http.client
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from atspeed.local.child_process import ChildProcess
from atspeed.local.free_ports import free_port

RULES: Final = Path(__file__).with_name("alerts.yml")
"""Copy of deploy/prometheus/alerts.yml."""
_HOST = "127.0.0.1"
_START_SECONDS = 30.0
_STOP_SECONDS = 5.0  # then SIGKILL


class LocalPrometheusError(RuntimeError):
    """A Prometheus that does not start. The text ends with its log."""


class LocalPrometheus:
    """A Prometheus process on a loopback port: a context manager. Its data is removed at the end.

    Raises LocalPrometheusError when it does not start.

    Attributes:
        port: the port that it listens on.
        log: the file of its log.
    """

    def __init__(self, binary: Path, jobs: Mapping[str, Sequence[int]], log: Path, *, port: int = 0) -> None:
        """Prepare the process without starting it.

        Args:
            jobs: metrics ports of the replicas by the name of their service.
            port: the port that it listens on; 0 for any.
        """
        self._binary = binary
        self._jobs = jobs
        self._child = ChildProcess()
        self._data: tempfile.TemporaryDirectory[str] | None = None
        self.port = port
        self.log = log

    @property
    def url(self) -> str:
        """Its address: http://127.0.0.1:<port>."""
        return f"http://{_HOST}:{self.port}"

    @property
    def running(self) -> bool:
        """True while the process lives."""
        return self._child.running

    def start(self) -> None:
        """Start Prometheus and wait until it answers."""
        self.port = free_port(self.port, "Prometheus")
        self._data = tempfile.TemporaryDirectory(prefix="atspeed-prometheus-")
        try:
            folder = Path(self._data.name)
            written = folder / "prometheus.json"
            written.write_text(json.dumps(self._configuration()), encoding="utf-8")  # JSON is YAML
            options = [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={_HOST}:{self.port}"]
            with self.log.open("ab") as log:
                self._child.start([self._binary, f"--config.file={written}", *options], log)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if it does not end in time. Its data is removed."""
        self._child.terminate()
        self._child.wait(_STOP_SECONDS)
        if self._data is not None:
            self._data.cleanup()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _configuration(self) -> Mapping[str, object]:
        scraped = [
            {"job_name": job, "static_configs": [{"targets": [f"{_HOST}:{port}" for port in ports]}]}
            for job, ports in self._jobs.items()
        ]
        often = {"scrape_interval": "5s", "evaluation_interval": "5s", "external_labels": {"runbooks": "docs"}}
        return {"global": often, "rule_files": [str(RULES)], "scrape_configs": scraped}

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self.running and time.monotonic() < deadline:
            if self._ready():
                return
            time.sleep(0.05)
        tail = self.log.read_text(errors="replace")[-2000:].strip()
        raise LocalPrometheusError(f"{self._binary} did not start on port {self.port}:\n{tail}")

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(
            _HOST, self.port, timeout=2.0
        )  # urllib would ask a proxy of the environment
        try:
            connection.request("GET", "/-/ready")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def prometheus_binary() -> Path | None:
    """Return Prometheus's binary; None if there is none."""
    path = shutil.which("prometheus")
    return Path(path) if path else None
