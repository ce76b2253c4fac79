"""Builds, runs and drains a grpc.aio server.

A service's `__main__.py` is its application and one call:

    @asynccontextmanager
    async def target(settings: TargetSettings) -> AsyncIterator[list[Registration]]:
        async with Evaluator.open(settings.bundle) as evaluator:
            yield [Registration.of(SERVICE, add_TargetServiceServicer_to_server, TargetServicer(evaluator))]

    run(TargetSettings, target)

The life of a server:

1. It reads the settings.
2. It enters the application, which loads models.
3. It listens, sets health to SERVING and writes one JSON line with the address to stdout.
4. SIGTERM or SIGINT starts the graceful drain: health becomes NOT_SERVING and no new call is accepted. Running calls end, or are
   cancelled after `drain_seconds`. Then the server leaves the application.

A signal during the start ends the start. Before `run`, `early_signals` handles signals. A second signal ends the process at once.
Exit codes: 0 after a signal, 128 + the number of a second signal, 1 for a failed start, 2 for bad settings.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Self, TypeVar

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from atspeed.concurrency.early_signals import SIGNALS
from atspeed.configuration.settings import ServiceSettings, spelling
from atspeed.engine.errors import EngineError
from atspeed.engine.host_names import host_port
from atspeed.errors import StartupError
from atspeed.observability import logs, tracing
from atspeed.observability.metrics import CERTIFICATE_EXPIRY, Readings, ServerMetrics, exposed
from atspeed.observability.telemetry_interceptor import TelemetryInterceptor
from atspeed.rpc import event_loop, grpc_workarounds
from atspeed.rpc.call_interceptor import CallInterceptor
from atspeed.rpc.channels import health_name
from atspeed.rpc.health import Health
from atspeed.rpc.versions import Versions
from atspeed.security.auth import AuthInterceptor
from atspeed.security.callers import Authenticator
from atspeed.security.certificate_expiry import CertificateExpiry, certificate_files
from atspeed.security.peers import Peers, networks
from atspeed.security.quotas import quota_of
from atspeed.security.tls import TlsError, server_credentials
from atspeed.security.tokens import TokenError, Tokens

Servicer = TypeVar("Servicer")
Settings = TypeVar("Settings", bound=ServiceSettings)

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Registration:
    """A service of a server.

    Attributes:
        name: full name of the service.
        add: adds the servicer to a server.
        versions: model versions that the service serves. Health is also published as `<name>/<version>`, by which clients
            balance the calls of one version over the replicas that serve it.
        metrics: registry with the service's metrics.
    """

    name: str
    add: Callable[[grpc.aio.Server], None]
    versions: Versions = field(default_factory=Versions)
    metrics: CollectorRegistry | None = None

    async def publish_health(self, health: Health) -> None:
        """Publish the service and its versions, now and after changes. A service with versions serves while one of them does."""
        serving: set[str] = set()

        async def publish(version: str, served: bool) -> None:
            (serving.add if served else serving.discard)(version)
            await health.set_serving(health_name(self.name, version), served)
            await health.set_serving(self.name, bool(serving))

        await health.set_serving(self.name, True)
        await self.versions.subscribe(publish)

    @classmethod
    def of(
        cls,
        service: ServiceDescriptor,
        add: Callable[[Servicer, grpc.aio.Server], None],
        servicer: Servicer,
        versions: Versions | None = None,
        metrics: CollectorRegistry | None = None,
    ) -> Self:
        """Return the registration of a servicer. service and add: generated descriptor and `add_..._to_server`."""
        return cls(service.full_name, lambda server: add(servicer, server), versions or Versions(), metrics)


Application = Callable[[Settings], AbstractAsyncContextManager[Sequence[Registration]]]


@dataclass(frozen=True)
class RunningServer:
    """A server that accepts calls.

    Attributes:
        host: host that it listens on.
        port: port that it listens on.
        metrics_port: port of the Prometheus exporter; None without one.
    """

    host: str
    port: int
    metrics_port: int | None = None

    @property
    def address(self) -> str:
        """Return `host:port` with the actual port."""
        return host_port(self.host, self.port)


def run(
    settings_type: type[Settings], application: Application[Settings], arguments: Sequence[str] | None = None
) -> None:
    """Run a service until a signal ends it. Exits with code 1 after a failed start, 2 for a bad setting."""
    settings = settings_type.load(arguments)
    logs.configure(settings.service, settings.log_level, settings.log_format, error_texts=settings.log_error_texts)
    logs.log_uncaught_exceptions()
    grpc_workarounds.free_ended_batches()
    try:
        with tracing.started(settings.service, on=settings.tracing):
            event_loop.run(serve(settings, application))
    except StartupError as error:
        _log.error("start_failed", reason=" ".join(str(error).split()))
        raise SystemExit(1) from None


async def serve(settings: Settings, application: Application[Settings]) -> None:
    """Open the application, serve it until SIGTERM or SIGINT, and drain."""
    asyncio.get_running_loop().set_exception_handler(logs.log_loop_failure)
    with _Signals() as signals:
        async with AsyncExitStack() as stack:
            try:
                async with signals.interrupt():
                    registrations = await stack.enter_async_context(_opened(settings, application))
                    server = await stack.enter_async_context(running(settings, registrations))
            except TimeoutError:
                if not signals.received.is_set():
                    raise
                _log.info("stopped_during_start")
                return
            _announce(settings, server)
            await signals.received.wait()
            _log.info("draining", drain_seconds=settings.drain_seconds)


@asynccontextmanager
async def running(settings: ServiceSettings, registrations: Sequence[Registration]) -> AsyncIterator[RunningServer]:
    """Run a server on the settings' address for the length of the block. The end of the block drains it."""
    state = Health()
    metrics = ServerMetrics(settings.service, [part.metrics for part in registrations if part.metrics])
    metrics.registry.register(Readings({CERTIFICATE_EXPIRY: CertificateExpiry(certificate_files(dict(settings)))}))
    server = _build(settings, registrations, state, metrics, await _authenticators(settings))
    port = _listen(settings, server)
    with _exposed(settings, metrics) as metrics_port:
        await server.start()
        await state.set_serving("", True)
        for registration in registrations:
            await registration.publish_health(state)
        try:
            yield RunningServer(settings.host, port, metrics_port)
        finally:
            await state.drain()
            await server.stop(settings.drain_seconds)


@contextmanager
def _exposed(settings: ServiceSettings, metrics: ServerMetrics) -> Iterator[int | None]:
    """Expose the metrics for the length of the block. Yields the port, or None without a metrics port."""
    if settings.metrics_port is None:
        yield None
        return
    with ExitStack() as stack:
        try:
            port = stack.enter_context(exposed(metrics.registry, settings.metrics_host, settings.metrics_port))
        except (OSError, UnicodeError) as error:  # a host's name that cannot be encoded for DNS
            names = f"{spelling(type(settings), 'metrics_host')}, {spelling(type(settings), 'metrics_port')}"
            where = host_port(settings.metrics_host, settings.metrics_port)
            raise StartupError(f"cannot listen on {where}; see {names}") from error
        yield port


@asynccontextmanager
async def _opened(settings: Settings, application: Application[Settings]) -> AsyncIterator[Sequence[Registration]]:
    """Open the application. A bundle, certificate or token file that cannot be used raises StartupError."""
    async with AsyncExitStack() as stack:
        try:
            registrations = await stack.enter_async_context(application(settings))
        except (EngineError, TlsError, TokenError) as error:
            raise StartupError(str(error)) from error
        yield registrations


def _build(
    settings: ServiceSettings,
    registrations: Sequence[Registration],
    state: Health,
    metrics: ServerMetrics,
    authenticators: Sequence[Authenticator],
) -> grpc.aio.Server:
    interceptors = [
        TelemetryInterceptor(metrics),
        CallInterceptor(settings.max_concurrent_calls, Peers(networks(settings.trusted_proxies))),
        *([AuthInterceptor(authenticators, metrics)] if authenticators else []),
    ]
    server = grpc.aio.server(interceptors=interceptors, options=server_options(settings))
    for registration in registrations:
        registration.add(server)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    names = [registration.name for registration in registrations]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    return server


async def _authenticators(settings: ServiceSettings) -> list[Authenticator]:
    """Return the ways to authenticate callers; none without a setting for them."""
    found: list[Authenticator] = []
    if settings.tokens_file is not None:
        try:
            found.append(Tokens(settings.tokens_file))
        except TokenError as error:
            raise StartupError(f"{spelling(type(settings), 'tokens_file')}: {error}") from None
    if settings.jwt_keys:
        found.append(await _json_web_tokens(settings))
    if found and settings.server_tls is None and not settings.loopback:
        _log.warning("tokens_without_tls", setting=spelling(type(settings), "tls_certificate"))
    return found


async def _json_web_tokens(settings: ServiceSettings) -> Authenticator:
    name = spelling(type(settings), "jwt_keys")
    try:
        from atspeed.security import json_web_tokens as tokens  # the extra `jwt`
    except ModuleNotFoundError:
        raise StartupError(f"{name}: needs `pip install 'atspeed-serving[jwt]'`") from None
    try:
        keys = tokens.KeySet(settings.jwt_keys)
        await keys.load()
    except tokens.KeySetError as error:
        raise StartupError(f"{name}: {error}") from None
    quota = quota_of(settings.jwt_requests_per_second, None)
    return tokens.JsonWebTokens(tokens.Issuer(settings.jwt_issuer, settings.jwt_audience, quota), keys)


def server_options(settings: ServiceSettings) -> list[tuple[str, int]]:
    """Return a server's channel arguments.

    A client may ping every 2 s. A client that pings more often is disconnected with ENHANCE_YOUR_CALM. (The often quoted key
    min_recv_ping_interval_without_data_ms has no effect.) Connections have a maximum age: clients then resolve names again and
    find new replicas. Running calls continue on the old connection for an hour at most.
    """
    return [
        ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_concurrent_streams", settings.max_streams),
        # Calls that have arrived and that Python has not accepted yet. gRPC drops some beyond the first limit (1,000 by
        # default) and all beyond the second; their callers see CANCELLED. Our limits refuse calls with a hint and a reason.
        ("grpc.server.max_pending_requests", 10_000),
        ("grpc.server.max_pending_requests_hard_limit", 20_000),
        ("grpc.max_metadata_size", settings.max_metadata_bytes),  # soft limit: no call below it is refused
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),  # hard limit
        ("grpc.server_handshake_timeout_ms", 10_000),  # closes a connection without a handshake
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
        ("grpc.max_connection_age_ms", int(settings.max_connection_seconds * 1000)),
        ("grpc.max_connection_age_grace_ms", 3_600_000),
    ]


def _listen(settings: ServiceSettings, server: grpc.aio.Server) -> int:
    try:
        if settings.server_tls is None:
            return server.add_insecure_port(settings.address)
        return server.add_secure_port(settings.address, server_credentials(settings.server_tls))
    except TlsError as error:
        raise StartupError(f"{spelling(type(settings), 'tls_certificate')}: {error}") from None
    except RuntimeError as error:
        names = f"{spelling(type(settings), 'host')}, {spelling(type(settings), 'port')}"
        raise StartupError(f"cannot listen on {settings.address}; see {names}") from error


def _announce(settings: ServiceSettings, server: RunningServer) -> None:
    """Write the address to stdout, in one JSON line for the parent process."""
    line = {"service": settings.service, "address": server.address, "port": server.port, "pid": os.getpid()}
    if server.metrics_port is not None:
        line["metrics_port"] = server.metrics_port
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    _log.info("listening", address=server.address, settings=settings.model_dump(mode="json"))


class _Signals:
    """Handles SIGTERM and SIGINT. It starts before models are loaded: PID 1 of a container has no default handler."""

    def __init__(self) -> None:
        self.received = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._interrupted: asyncio.Timeout | None = None
        self._seen = False

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._note) for number in SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        if self._seen:  # the handlers stay, so that a second signal still ends the process
            return
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    @asynccontextmanager
    async def interrupt(self) -> AsyncIterator[None]:
        """End the block with TimeoutError at a signal."""
        async with asyncio.timeout(None) as self._interrupted:
            yield
        self._interrupted = None

    def _note(self, number: int, _frame: object) -> None:
        """Handle a signal between two instructions, so that it works while a model is loaded."""
        if self._seen:
            os._exit(128 + number)
        self._seen = True
        self._loop.call_soon_threadsafe(self._act)

    def _act(self) -> None:
        self.received.set()
        if self._interrupted is not None:
            self._interrupted.reschedule(self._loop.time())
