"""Co-batched requests: how many share a pass of the targets, from their metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection

from prometheus_client.parser import text_string_to_metric_families

from atspeed.local.stack import ServiceProcess

_METRIC = "atspeed_pass_requests"
_SECONDS = 10.0  # a scrape takes milliseconds; a loaded machine may take longer


@dataclass(frozen=True)
class SharedPasses:
    """Sum and count of a histogram with an entry for each pass of each request: how many requests shared it."""

    total: float = 0.0
    count: float = 0.0

    def __sub__(self, before: SharedPasses) -> SharedPasses:
        """Return the entries since `before`."""
        return SharedPasses(self.total - before.total, self.count - before.count)

    @property
    def mean(self) -> float | None:
        """Mean number of requests in a pass, as each of them sees it; None without an entry."""
        return round(self.total / self.count, 3) if self.count else None

    @classmethod
    def of(cls, pages: Iterable[str]) -> SharedPasses:
        """Add up the metrics of several services. pages: the text that each of them exposes."""
        found = {"sum": 0.0, "count": 0.0}
        for page in pages:
            for family in text_string_to_metric_families(page):
                for sample in family.samples if family.name == _METRIC else ():
                    suffix = sample.name.removeprefix(f"{_METRIC}_")
                    if suffix in found:
                        found[suffix] += sample.value
        return cls(found["sum"], found["count"])


def shared_passes(targets: Sequence[ServiceProcess]) -> SharedPasses:
    """Return the shared passes of these targets since they started."""
    ports = [target.metrics_port for target in targets if target.metrics_port]
    return SharedPasses.of(map(_page, ports))


def _page(port: int) -> str:
    # urllib would ask a proxy of the environment.
    with closing(HTTPConnection("127.0.0.1", port, timeout=_SECONDS)) as connection:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
