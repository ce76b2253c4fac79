"""Channels of the client: options, certificates that may change, bearer tokens."""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from atspeed_client import addresses, arguments
from atspeed_client.errors import ArgumentValueError, CertificateError

SERVICE = "atspeed.v1.RecommendationService"
_MAX_MESSAGE_BYTES = 33_554_432  # 32 MiB, more than any list or history needs
_Channel = TypeVar("_Channel")
_Path = str | os.PathLike[str]

# Calls go round-robin over the replicas that report SERVING. The client retries by itself (`atspeed_client.calls`).
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": SERVICE},
}
# Pings notice a replica that vanished or hangs within 6 s.
OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.enable_http_proxy", 0),  # a proxy for the internet cannot reach a service inside a cluster
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
]


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS of a client, from PEM files. Changed files are used by the calls that follow, once they match.

    Attributes:
        ca: CA of the server's certificate; None for gRPC's own roots.
        certificate: client certificate chain for mTLS, leaf first.
        key: key of the client certificate.
        server_name: name in the server's certificate, if it is not the name in the address.
    """

    ca: _Path | None = None
    certificate: _Path | None = None
    key: _Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        for name in ("ca", "certificate", "key"):
            if (path := getattr(self, name)) is not None:
                arguments.path(f"tls.{name}", path)
        arguments.text("tls.server_name", self.server_name, required=False)
        if (self.certificate is None) != (self.key is None):
            raise ArgumentValueError("tls", "certificate and key go together")

    @property
    def paths(self) -> list[str]:
        """Return the files that are set."""
        return [os.fspath(path) for path in (self.ca, self.certificate, self.key) if path is not None]


class Endpoint:
    """Address, certificates and token of a service; checks them."""

    def __init__(self, address: str, tls: Tls | None, token: str | Callable[[], str] | None) -> None:
        try:
            self.target = addresses.target(arguments.text("address", address))
        except ArgumentValueError:
            raise
        except ValueError as error:
            raise ArgumentValueError("address", str(error)) from None
        self.files = None if tls is None else _Files(arguments.message("tls", tls, Tls))
        name = tls.server_name if tls is not None else ""
        self.options = [*OPTIONS, ("grpc.default_authority", name)] if name else OPTIONS
        self._token = token if token is None or callable(token) else arguments.token("token", token)

    def authorization(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata with the token. Raises what the function of a token raises."""
        if self._token is None:
            return ()
        token = arguments.token("token", self._token()) if callable(self._token) else self._token
        return (("authorization", f"Bearer {token}"),)


class Channels(Generic[_Channel]):
    """Channel of the next call. Thread-safe.

    Changed certificates open a new channel. Running calls hold the old one, which closes with the last of them.
    """

    def __init__(self, endpoint: Endpoint, plain: Callable[..., _Channel], secure: Callable[..., _Channel]) -> None:
        self._endpoint, self._plain, self._secure = endpoint, plain, secure
        self._lock = threading.Lock()
        self._seen: Any = None
        self._channel: _Channel | None = None

    def current(self) -> _Channel:
        """Return the channel, and open it if there is none."""
        files = self._endpoint.files
        with self._lock:
            credentials = None if files is None else files.credentials()
            if self._channel is None or credentials is not self._seen:
                self._seen = credentials
                self._channel = self._open(credentials)
            return self._channel

    def take(self) -> _Channel | None:
        """Return the open channel, to close it; None if there is none."""
        with self._lock:
            channel, self._channel = self._channel, None
            return channel

    def _open(self, credentials: grpc.ChannelCredentials | None) -> _Channel:
        target, options = self._endpoint.target, self._endpoint.options
        if credentials is None:
            return self._plain(target, options=options)
        return self._secure(target, credentials, options=options)


class _Files:
    """Credentials of PEM files: the last ones that matched. Raises CertificateError if the first ones do not."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._signature = self._current()
        self._credentials = self._read()

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the credentials; one `stat` of each file tells whether they changed."""
        with self._lock:
            if (signature := self._current()) != self._signature:
                self._signature = signature
                # A new certificate comes before its key: the earlier ones stay in use until both are there.
                with suppress(CertificateError):
                    self._credentials = self._read()
            return self._credentials

    def _current(self) -> tuple[Any, ...]:
        return tuple(_signature(path) for path in self._tls.paths)

    def _read(self) -> grpc.ChannelCredentials:
        """Check and read the files. gRPC ends the process for a key that it cannot read."""
        tls, context = self._tls, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        pems = _bytes(tls)
        try:
            if tls.certificate is not None:
                # With a password, so that an encrypted key does not ask the terminal.
                context.load_cert_chain(tls.certificate, tls.key, password="")
            if pems[0] is not None:
                context.load_verify_locations(cadata=pems[0].decode("ascii"))
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise CertificateError("tls", f"{' and '.join(tls.paths)}: {_problem(error)}") from None
        if pems != _bytes(tls):
            raise CertificateError("tls", "the files are being written")
        ca, certificate, key = pems
        return grpc.ssl_channel_credentials(ca, key, certificate)


def _bytes(tls: Tls) -> tuple[bytes | None, ...]:
    return tuple(None if path is None else _content(path) for path in (tls.ca, tls.certificate, tls.key))


def _content(path: _Path) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - any path
            return file.read()
    except OSError as error:
        raise CertificateError("tls", f"{os.fspath(path)}: {error.strerror}") from None


def _signature(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - any path
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _problem(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return (error.strerror if isinstance(error, OSError) else None) or "not PEM"
