"""A Prometheus on this machine, with the project's alert rules.

`atspeed up --metrics` uses it where the binary `prometheus` is on the PATH.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from atspeed.local.http_server_process import HOST, HttpServerProcess

RULES: Final = Path(__file__).with_name("alerts.yml")
"""Copy of deploy/prometheus/alerts.yml."""


class LocalPrometheusError(RuntimeError):
    """A Prometheus that does not start. The text ends with its log."""


class LocalPrometheus(HttpServerProcess):
    """A Prometheus process on a loopback port: a context manager. Its data is removed at the end.

    Raises LocalPrometheusError when it does not start.
    """

    error = LocalPrometheusError
    purpose = "Prometheus"
    health_path = "/-/ready"

    def __init__(self, binary: Path, jobs: Mapping[str, Sequence[int]], log: Path, *, port: int = 0) -> None:
        """Prepare the process without starting it.

        Args:
            jobs: metrics ports of the replicas by the name of their service.
            port: the port that it listens on; 0 for any.
        """
        super().__init__(binary, log, port=port)
        self._jobs = jobs

    def _options(self, folder: Path) -> Sequence[str | Path]:
        written = folder / "prometheus.json"
        written.write_text(json.dumps(self._configuration()), encoding="utf-8")  # JSON is YAML
        listens = f"--web.listen-address={HOST}:{self.port}"
        return [f"--config.file={written}", f"--storage.tsdb.path={folder / 'data'}", listens]

    def _configuration(self) -> Mapping[str, object]:
        scraped = [
            {"job_name": job, "static_configs": [{"targets": [f"{HOST}:{port}" for port in ports]}]}
            for job, ports in self._jobs.items()
        ]
        often = {"scrape_interval": "5s", "evaluation_interval": "5s", "external_labels": {"runbooks": "docs"}}
        return {"global": often, "rule_files": [str(RULES)], "scrape_configs": scraped}


def prometheus_binary() -> Path | None:
    """Return Prometheus's binary; None if there is none."""
    path = shutil.which("prometheus")
    return Path(path) if path else None
