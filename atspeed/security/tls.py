"""TLS from PEM files that may be replaced while the process runs.

A new certificate is used from the next handshake on: a server fetches its credentials for each one, a client opens a new channel
and calls on it as soon as it is connected (rotating_channel.py). Files that do not fit together, such as a new certificate beside
the old key, are left alone until they do; what was read before stays in use.

    ValueError
    +-- TlsError   files that are no certificate, key or CA, or do not belong together; the text names them
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from atspeed.security.file_watch import Stamp, file_signature

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class TlsError(ValueError):
    """Files that TLS cannot work with. The text names them and quotes nothing of what is in them."""


class _BeingWrittenError(TlsError):
    """Files that changed while they were read: the next look may find them whole."""


@dataclass(frozen=True)
class TlsFiles:
    """One end's PEM files. certificate: its chain, leaf first; key: of the leaf; ca: whom it trusts at the other end."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """Those that there are."""
        return [path for path in (self.certificate, self.key, self.ca) if path]


@dataclass(frozen=True)
class ClientTls:
    """How a client speaks TLS.

    files.ca: by which servers are checked, gRPC's own roots without one. files.certificate and key: for mTLS. server_name: the
    name that the server's certificate must have, where that is not the one in the address.
    """

    files: TlsFiles = TlsFiles()
    server_name: str = ""

    @property
    def options(self) -> list[tuple[str, str | int]]:
        """Channel arguments."""
        return [("grpc.default_authority", self.server_name)] if self.server_name else []


@dataclass(frozen=True)
class Pems:
    """What the files held; None for one that is not there."""

    certificate: bytes | None
    key: bytes | None
    ca: bytes | None

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        """For a server's next handshakes."""
        return grpc.ssl_server_certificate_configuration([(self.key or b"", self.certificate or b"")], self.ca)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a new channel."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)


class WatchedPems:
    """PEM files as they were when they last fitted together. Thread-safe. Raises TlsError when they do not at first."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._pems = _read(files)

    @property
    def current(self) -> Pems:
        """What was last read."""
        return self._pems

    def changed(self) -> bool:
        """Look at the files again; whether `current` is another than before. Costs a `stat` for each file."""
        with self._lock:
            signature = self._signature()
            if signature == self._seen:
                return False
            try:
                fresh = _read(self._files)
            except _BeingWrittenError:
                return False
            except TlsError as error:
                if signature == self._signature():  # else they are just being written
                    self._seen = signature
                    _log.error("TLS files are not used", reason=str(error))
                return False
            self._seen = signature
            if fresh == self._pems:
                return False
            self._pems = fresh
        _log.info("TLS files are read again", files=[str(path) for path in self._files.paths])
        return True

    def _signature(self) -> tuple[Stamp | None, ...]:
        return tuple(file_signature(path) for path in self._files.paths)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """A server's credentials, read again when the files change. With a `ca`, clients must show a certificate of that CA.

    Raises TlsError.
    """
    watched = WatchedPems(files)

    def fetch() -> Any:  # None keeps what there is; the stubs do not know that
        return watched.current.server_configuration() if watched.changed() else None

    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        watched.current.server_configuration(), fetch, require_client_authentication=files.ca is not None
    )
    return credentials


def _read(files: TlsFiles) -> Pems:
    """The files' content. Raises TlsError, _BeingWrittenError.

    Python checks certificates by path only, so they are read once more after that: a file that is just being written has no
    byte for a moment, and gRPC ends the process for an empty key.
    """
    try:
        pems = _bytes(files)
    except OSError as error:
        raise TlsError(f"{error.filename}: {_reason(error)}") from None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if files.certificate:
            # With a password, so that an encrypted key does not ask the terminal.
            context.load_cert_chain(files.certificate, files.key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise TlsError(f"{_names(files.certificate, files.key)}: {_reason(error)}") from None
    try:
        if pems.ca is not None:
            context.load_verify_locations(cadata=pems.ca.decode("ascii"))
    except (OSError, ValueError) as error:
        raise TlsError(f"{files.ca}: {_reason(error)}") from None
    try:
        settled = pems == _bytes(files)
    except OSError:
        settled = False
    if not settled:
        raise _BeingWrittenError(f"{_names(*files.paths)}: being written")
    return pems


def _bytes(files: TlsFiles) -> Pems:
    return Pems(*(path.read_bytes() if path else None for path in (files.certificate, files.key, files.ca)))


def _names(*paths: Path | None) -> str:
    return " and ".join(str(path) for path in paths if path)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return (error.strerror if isinstance(error, OSError) else None) or "not PEM"
