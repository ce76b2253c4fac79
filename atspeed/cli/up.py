"""`atspeed up`: the services on this machine."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from atspeed.cli.interrupts import interruptible
from atspeed.cli.options import MAX_REPLICAS, BundleFolder, CommandError, err, optional, out
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.engine.kv.redis_url import check_redis_url
from atspeed.local.edge import LocalEdge, envoy_binary, free_port
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack

if TYPE_CHECKING:
    from atspeed.local.certificates import LocalCertificates


def _redis_url(value: str | None) -> str | None:
    try:
        return check_redis_url(value) if value else value
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


RedisUrl = Annotated[
    str | None,
    typer.Option(
        help="URL of a running Redis; without it one is started. Prefer the variable for a URL with a password, "
        "since command lines are visible to all users.",
        envvar="REDIS_URL",
        callback=_redis_url,
    ),
]
RedisFolder = Annotated[
    Path | None,
    typer.Option(
        help="Data folder of the Redis that is started. Without it, recorded histories are kept in memory only "
        "and lost at the end.",
        file_okay=False,
    ),
]
HttpPort = Annotated[
    int | None,
    typer.Option(
        "--http", min=0, max=65535, help="Also take JSON and gRPC-Web over HTTP on this port, by Envoy; 0 for any."
    ),
]


def _host_names(values: list[str]) -> list[str]:
    for value in values:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:]{2,45}\]", value):
            raise typer.BadParameter("must be a host name or an address, without a port")
    return [value.lower() for value in values]


HttpHosts = Annotated[
    list[str],
    typer.Option(
        "--http-host",
        help="Name in URLs that --http and --console answer, beside localhost, 127.0.0.1 and [::1]; repeatable.",
        callback=_host_names,
    ),
]
ConsolePort = Annotated[
    int | None,
    typer.Option(
        "--console", min=0, max=65535, help="As --http, and serve the console, a page that shows searches; 0 for any."
    ),
]


def up(
    bundle: BundleFolder,
    targets: Annotated[int, typer.Option(min=1, max=MAX_REPLICAS, help="Target replicas.")] = 1,
    drafts: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_REPLICAS, help="Draft replicas; by default 1 if the bundle has a draft."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 lets the system choose.")] = 50051,
    redis_url: RedisUrl = None,
    data: RedisFolder = None,
    log_folder: Annotated[Path | None, typer.Option(help="Folder for the services' logs.", file_okay=False)] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Use TLS, and mutual TLS between the services, with throwaway certificates.")
    ] = False,
    http: HttpPort = None,
    console: ConsolePort = None,
    http_host: HttpHosts = [],  # noqa: B006 - typer copies it
) -> None:
    """Run all services on this machine until Ctrl-C."""
    if redis_url and data:
        raise typer.BadParameter(
            "--data is for the Redis that is started without --redis-url (REDIS_URL); give only one of them"
        )
    if http is not None and console is not None:
        raise typer.BadParameter("--console takes JSON on its port too; give only one of --http and --console")
    http = console if http is None else http
    if http_host and http is None:
        raise typer.BadParameter("--http-host needs --http or --console")
    manifest = read_manifest(bundle)
    if drafts and manifest.draft is None:
        raise CommandError(f"{bundle}: the bundle has no draft model, use --drafts 0")
    drafts = (1 if manifest.draft else 0) if drafts is None else drafts
    if log_folder:
        log_folder.mkdir(parents=True, exist_ok=True)
    if http is not None:
        envoy_binary()
        http = free_port(http)  # as a missing Envoy, a port that is taken is said before anything starts
    with ExitStack() as running:
        running.enter_context(interruptible())
        try:
            kept = "in the Redis that you named"
            if not redis_url:
                redis_url = running.enter_context(LocalRedis(folder=data)).url
                kept = f"in {data}" if data else "in memory and lost at the end; --data DIR keeps them"
            with err.status("starting"):
                certificates = _throwaway(running) if tls else None
                stack = running.enter_context(
                    LocalStack(
                        bundle,
                        redis_url=redis_url,
                        drafts=drafts,
                        targets=targets,
                        port=port,
                        log_folder=log_folder,
                        flags=certificates.flags if certificates else None,
                    )
                )
                edge = None
                if http is not None:
                    edge = _edge(running, http, stack, certificates, console=console is not None, hosts=http_host)
            ca = certificates.ca if certificates else None
            _announce(manifest.name, stack, kept, ca)
            if edge:
                _announce_edge(edge, ca)
                if console is not None:
                    out.print(f"The console is at [bold]{edge.url}/console/[/bold]", highlight=False, soft_wrap=True)
            _watch(stack, edge)
        except KeyboardInterrupt:
            err.print("draining", highlight=False)


def _throwaway(running: ExitStack) -> LocalCertificates:
    """Make certificates that exist as long as the services run."""
    folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="atspeed-tls-")))
    made: LocalCertificates = optional("atspeed.local.certificates").LocalCertificates(folder)
    return made


def _edge(
    running: ExitStack,
    port: int,
    stack: LocalStack,
    certificates: LocalCertificates | None,
    *,
    console: bool,
    hosts: Sequence[str],
) -> LocalEdge:
    """Start the way in for HTTP."""
    tls = certificates.files("edge") if certificates else None
    replicas = [orchestrator.address for orchestrator in stack.orchestrators]
    return running.enter_context(
        LocalEdge(replicas, stack.log_folder / "edge.log", port=port, console=console, tls=tls, hosts=hosts)
    )


def _announce(name: str, stack: LocalStack, kept: str, ca: Path | None) -> None:
    out.print(f"{name} is served at [bold]{stack.address}[/bold]", highlight=False, soft_wrap=True)
    for service in stack.services:
        number = service.process.pid if service.process else 0
        err.print(f"  {service.module} {service.address}, process {number}", highlight=False, soft_wrap=True)
    err.print(f"  histories are kept {kept}", highlight=False, markup=False, soft_wrap=True)
    how = f"--address {stack.address}" + (f" --ca {ca}" if ca else "")
    err.print(f"  try: atspeed info {how}; Ctrl-C stops the services", highlight=False, soft_wrap=True)


def _announce_edge(edge: LocalEdge, ca: Path | None) -> None:
    out.print(f"HTTP is served at [bold]{edge.url}[/bold]", highlight=False, soft_wrap=True)
    curl = f"curl {edge.url}/v1/info" + (f" --cacert {ca}" if ca else "")
    err.print(f"  try: {curl}; the paths are in {edge.url}/openapi.json", highlight=False, soft_wrap=True)


def _watch(stack: LocalStack, edge: LocalEdge | None) -> NoReturn:
    """Wait for a signal, or fail when a service ends."""
    while True:
        if edge and not edge.running:
            raise CommandError(f"Envoy at {edge.url} ended unexpectedly; its log is {edge.log}")
        for service in stack.services:
            if not service.running:
                raise CommandError(f"{service.module} at {service.address} ended unexpectedly")
        time.sleep(0.3)
