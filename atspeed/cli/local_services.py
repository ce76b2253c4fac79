"""Start, announcement and watch of the services of `atspeed up`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from atspeed.cli.interrupts import interruptible
from atspeed.cli.options import CommandError, err, optional, out, warn
from atspeed.local.edge import LocalEdge, envoy_binary
from atspeed.local.free_ports import free_port
from atspeed.local.prometheus import LocalPrometheus, prometheus_binary
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack

if TYPE_CHECKING:
    from atspeed.local.certificates import LocalCertificates


@dataclass(frozen=True)
class Services:
    """Services of one bundle that a command asks for.

    Attributes:
        name: name of the bundle.
        port: port of the orchestrator; 0 for any, as for all ports.
        redis_url: running Redis; None to start one.
        data: data folder of the Redis that is started; None for memory only.
        tls: whether throwaway certificates are used.
        http: port of Envoy; None without it.
        http_hosts: host names that Envoy serves besides those of this machine.
        metrics: port of Prometheus; None without metrics.
        tokens: settings of the orchestrator about tokens, by the names of their flags.
    """

    bundle: Path
    name: str
    targets: int
    drafts: int
    port: int
    redis_url: str | None
    data: Path | None
    log_folder: Path | None
    tls: bool
    http: int | None
    http_hosts: Sequence[str]
    console: bool
    metrics: int | None
    tokens: Mapping[str, object]

    @property
    def count(self) -> int:
        """The number of services, the orchestrator among them."""
        return self.targets + self.drafts + 1


def serve(asked: Services) -> None:
    """Run the services until SIGTERM or Ctrl-C. Raises CommandError when one ends."""
    if asked.log_folder:
        asked.log_folder.mkdir(parents=True, exist_ok=True)
    if asked.http is not None:  # a missing Envoy or a port in use is reported before anything starts
        envoy_binary()
        free_port(asked.http, "HTTP")
    if asked.metrics is not None:
        free_port(asked.metrics, "Prometheus")
        if asked.metrics:
            for place in range(1, asked.count + 1):
                free_port(asked.metrics + place, "the metrics of a service")
    with interruptible(), ExitStack() as running:
        try:
            _run(asked, running)
        except KeyboardInterrupt:
            err.print("draining", highlight=False)


def _run(asked: Services, running: ExitStack) -> NoReturn:
    """Start the services, print their addresses and watch them."""
    redis_url, kept = asked.redis_url, "in the Redis that you named"
    if not redis_url:
        redis_url = running.enter_context(LocalRedis(folder=asked.data)).url
        kept = f"in {asked.data}" if asked.data else "in memory and lost at the end; --data DIR keeps them"
    with err.status("starting"):
        certificates = _throwaway(running) if asked.tls else None
        stack = running.enter_context(_stack(asked, redis_url, certificates))
        edge = None if asked.http is None else running.enter_context(_edge(asked, asked.http, stack, certificates))
        prometheus = running.enter_context(_prometheus(asked, stack))
    ca = certificates.ca if certificates else None
    _announce(asked, stack, kept, ca)
    if edge:
        _announce_edge(asked, edge, ca)
    if prometheus:
        out.print(f"Prometheus is at [bold]{prometheus.url}[/bold]", highlight=False, soft_wrap=True)
    _watch(stack, edge, prometheus)


def _throwaway(running: ExitStack) -> LocalCertificates:
    """Make certificates that are removed when the services end."""
    folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="atspeed-tls-")))
    made: LocalCertificates = optional("atspeed.local.certificates").LocalCertificates(folder)
    return made


def _stack(asked: Services, redis_url: str, certificates: LocalCertificates | None) -> LocalStack:
    flags = {name: dict(settings) for name, settings in (certificates.flags if certificates else {}).items()}
    flags["orchestrator"] = {**flags.get("orchestrator", {}), **asked.tokens}
    stack = LocalStack(
        asked.bundle,
        redis_url=redis_url,
        drafts=asked.drafts,
        targets=asked.targets,
        port=asked.port,
        log_folder=asked.log_folder,
        flags=flags,
    )
    if asked.metrics is not None:
        for place, service in enumerate(stack.services, start=1):
            service.flags["metrics-port"] = asked.metrics and asked.metrics + place
    return stack


def _edge(asked: Services, port: int, stack: LocalStack, certificates: LocalCertificates | None) -> LocalEdge:
    tls = certificates.files("edge") if certificates else None
    replicas = [orchestrator.address for orchestrator in stack.orchestrators]
    log = stack.log_folder / "edge.log"
    return LocalEdge(replicas, log, port=port, console=asked.console, tls=tls, hosts=asked.http_hosts)


@contextmanager
def _prometheus(asked: Services, stack: LocalStack) -> Iterator[LocalPrometheus | None]:
    """Run Prometheus during the block. Yields None without its binary or without metrics."""
    binary = prometheus_binary()
    if asked.metrics is None or binary is None:
        if asked.metrics is not None:
            warn("no prometheus on the PATH: the services expose metrics, but no Prometheus collects them")
        yield None
        return
    jobs = {"draft": stack.drafts, "target": stack.targets, "orchestrator": stack.orchestrators}
    ports = {job: [one.metrics_port for one in services if one.metrics_port] for job, services in jobs.items()}
    with LocalPrometheus(binary, ports, stack.log_folder / "prometheus.log", port=asked.metrics) as prometheus:
        yield prometheus


def _announce(asked: Services, stack: LocalStack, kept: str, ca: Path | None) -> None:
    out.print(f"{asked.name} is served at [bold]{stack.address}[/bold]", highlight=False, soft_wrap=True)
    for service in stack.services:
        number = service.process.pid if service.process else 0
        metrics = f", metrics http://127.0.0.1:{service.metrics_port}/metrics" if service.metrics_port else ""
        err.print(f"  {service.module} {service.address}, process {number}{metrics}", highlight=False, soft_wrap=True)
    err.print(f"  histories are kept {kept}", highlight=False, markup=False, soft_wrap=True)
    how = f"--address {stack.address}" + (f" --ca {ca}" if ca else "") + (" --token TOKEN" if asked.tokens else "")
    err.print(f"  try: atspeed info {how}; Ctrl-C stops the services", highlight=False, soft_wrap=True)


def _announce_edge(asked: Services, edge: LocalEdge, ca: Path | None) -> None:
    out.print(f"HTTP is served at [bold]{edge.url}[/bold]", highlight=False, soft_wrap=True)
    token = " -H 'Authorization: Bearer TOKEN'" if asked.tokens else ""
    curl = f"curl {edge.url}/v1/info" + (f" --cacert {ca}" if ca else "") + token
    err.print(f"  try: {curl}; the paths are in {edge.url}/openapi.json", highlight=False, soft_wrap=True)
    if asked.console:
        out.print(f"The console is at [bold]{edge.url}/console/[/bold]", highlight=False, soft_wrap=True)


def _watch(stack: LocalStack, edge: LocalEdge | None, prometheus: LocalPrometheus | None) -> NoReturn:
    """Wait for a signal, or fail when a process ends."""
    while True:
        for name, process in (("Envoy", edge), ("Prometheus", prometheus)):
            if process and not process.running:
                raise CommandError(f"{name} at {process.url} ended unexpectedly; its log is {process.log}")
        for service in stack.services:
            if not service.running:
                raise CommandError(f"{service.module} at {service.address} ended unexpectedly")
        time.sleep(0.3)
