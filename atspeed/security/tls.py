"""TLS from PEM files that may be replaced while the process runs.

A new certificate is used from the next handshake on. A server fetches its credentials for each handshake. A client opens a new
channel and uses it once it is connected (rotating_channel.py). Files that do not match, such as a new certificate with the old
key, are ignored until they do; the earlier ones stay in use.

    ValueError
    +-- TlsError   files that are no certificate, key or CA, or that do not match; the text names them
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from atspeed.security.file_watch import FileSignature, file_signature

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class TlsError(ValueError):
    """Files that TLS cannot use. The text names the files and quotes no content."""


class _BeingWrittenError(TlsError):
    """Files that changed while they were read. The next check may find them complete."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one end of a connection.

    Attributes:
        certificate: certificate chain, leaf first.
        key: key of the leaf certificate.
        ca: CA that the other end's certificate must come from.
    """

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """Return the files that are set."""
        return [path for path in (self.certificate, self.key, self.ca) if path]


@dataclass(frozen=True)
class ClientTls:
    """TLS of a client.

    Attributes:
        files: `ca` verifies servers, by default gRPC's own roots. `certificate` and `key` are for mTLS.
        server_name: name that the server's certificate must have, if it is not the name in the address.
    """

    files: TlsFiles = TlsFiles()
    server_name: str = ""

    @property
    def options(self) -> list[tuple[str, str | int]]:
        """Return the channel arguments."""
        return [("grpc.default_authority", self.server_name)] if self.server_name else []


@dataclass(frozen=True)
class Pems:
    """Contents of PEM files; None for a file that is not set.

    Attributes:
        certificate: certificate chain.
        key: key of the certificate.
        ca: CA certificates.
    """

    certificate: bytes | None
    key: bytes | None
    ca: bytes | None

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        """Return the configuration of a server's next handshakes."""
        return grpc.ssl_server_certificate_configuration([(self.key or b"", self.certificate or b"")], self.ca)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return the credentials of a new channel."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)


class WatchedPems:
    """The last matching contents of PEM files. Thread-safe. Raises TlsError if the files do not match at first."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._pems = _read(files)

    @property
    def current(self) -> Pems:
        """Return the contents in use."""
        return self._pems

    def changed(self) -> bool:
        """Check the files again, by one `stat` each. Returns True if `current` has changed."""
        with self._lock:
            signature = self._signature()
            if signature == self._seen:
                return False
            try:
                fresh = _read(self._files)
            except _BeingWrittenError:
                return False
            except TlsError as error:
                if signature == self._signature():  # else they are still being written
                    self._seen = signature
                    _log.error("tls_files_rejected", reason=str(error))
                return False
            self._seen = signature
            if fresh == self._pems:
                return False
            self._pems = fresh
        _log.info("tls_files_reloaded", files=[str(path) for path in self._files.paths])
        return True

    def _signature(self) -> tuple[FileSignature | None, ...]:
        return tuple(file_signature(path) for path in self._files.paths)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return a server's credentials, which follow changes of the files. Raises TlsError.

    With a `ca`, clients must present a certificate of that CA.
    """
    watched = WatchedPems(files)

    def fetch() -> Any:  # None keeps the current ones, which the stubs do not know
        return watched.current.server_configuration() if watched.changed() else None

    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        watched.current.server_configuration(), fetch, require_client_authentication=files.ca is not None
    )
    return credentials


def _read(files: TlsFiles) -> Pems:
    """Read and check the files. Raises TlsError, _BeingWrittenError.

    Python checks certificates by path only, so the files are read once more after the check. A file that is being written is
    empty for a moment, and gRPC ends the process for an empty key.
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
