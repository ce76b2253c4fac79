"""Throwaway certificates for this machine (extra `local`): `atspeed up --tls`, `atspeed certificates`, tests.

Not for production: the key of the CA is made in memory and never written, so no certificate can be added or renewed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import trustme

from atspeed.engine.files.atomic_write import replacing
from atspeed.security.tls import ClientTls, TlsFiles

SERVICES = ("orchestrator", "target", "draft", "redis", "edge", "client")
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class LocalCertificates:
    """A CA in a folder: ca.crt, and for each service a folder NAME with its own tls.crt and tls.key, and ca.crt again.

    Each certificate is valid for its name and for this machine. The names are those of a TLS Secret in Kubernetes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        for name in SERVICES:
            (folder / name).mkdir(parents=True, exist_ok=True)
            self.issue(name)
        self._trust(self._ca.cert_pem.bytes())

    @property
    def ca(self) -> Path:
        """The CA's certificate."""
        return self.folder / "ca.crt"

    def issue(self, name: str, *, not_after: datetime | None = None) -> TlsFiles:
        """A new certificate for `name`, over the one that it had. The key is readable by its owner alone."""
        made = self._ca.issue_cert(name, *LOCAL_NAMES, common_name=name, not_after=not_after)
        with replacing(self._key(name), mode=0o600) as file:
            file.write(made.private_key_pem.bytes())
        with replacing(self._certificate(name)) as file:
            file.write(b"".join(part.bytes() for part in made.cert_chain_pems))
        return self.files(name)

    @contextmanager
    def new_authority(self) -> Iterator[None]:
        """Another CA, trusted beside the old one within the block, in which certificates can be issued, and alone after it."""
        before, self._ca = self._ca, trustme.CA(key_type=trustme.KeyType.ECDSA)
        self._trust(before.cert_pem.bytes() + self._ca.cert_pem.bytes())
        yield
        self._trust(self._ca.cert_pem.bytes())

    def files(self, name: str) -> TlsFiles:
        """A service's files; they trust this CA."""
        return TlsFiles(self._certificate(name), self._key(name), self.ca)

    def client(self, name: str = "client", server_name: str = "") -> ClientTls:
        """How a client shows itself as `name`."""
        return ClientTls(self.files(name), server_name)

    @property
    def flags(self) -> Mapping[str, Mapping[str, object]]:
        """Settings by service: mutual TLS inside, and a public port that asks for no certificate."""
        return {"draft": self._model("draft"), "target": self._model("target"), "orchestrator": self._orchestrator()}

    def _model(self, name: str) -> Mapping[str, object]:
        return {**self._serving(name), "tls-client-ca": self.ca}

    def _orchestrator(self) -> Mapping[str, object]:
        own = self.files("orchestrator")
        calling = {"model-ca": self.ca, "model-certificate": own.certificate, "model-key": own.key}
        return {**self._serving("orchestrator"), **calling, "target-name": "target", "draft-name": "draft"}

    def _serving(self, name: str) -> Mapping[str, object]:
        return {"tls-certificate": self._certificate(name), "tls-key": self._key(name)}

    def _trust(self, authorities: bytes) -> None:
        for folder in (self.folder, *(self.folder / name for name in SERVICES)):
            with replacing(folder / "ca.crt") as file:
                file.write(authorities)

    def _certificate(self, name: str) -> Path:
        return self.folder / name / "tls.crt"

    def _key(self, name: str) -> Path:
        return self.folder / name / "tls.key"
