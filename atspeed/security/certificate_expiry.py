"""End of validity of the certificates that a service uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cryptography import x509

from atspeed.security.file_watch import FileSignature, file_signature


class CertificateExpiry:
    """The end of validity of certificates in PEM files, read again when a file changes. files: paths by setting."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._known: dict[str, tuple[FileSignature, float]] = {}

    def __call__(self) -> Mapping[tuple[str, ...], float]:
        """Return the Unix time at which the first certificate of each file ends, by setting.

        A file that cannot be read has the time of its last readable content; without one it is left out.
        """
        for setting, path in self._files.items():
            signature = file_signature(path)
            if signature is None or self._known.get(setting, (None, 0.0))[0] == signature:
                continue
            try:
                certificates = x509.load_pem_x509_certificates(path.read_bytes())
            except (OSError, ValueError):
                continue
            ends = min(certificate.not_valid_after_utc.timestamp() for certificate in certificates)
            self._known[setting] = signature, ends
        return {(setting,): ends for setting, (_, ends) in self._known.items()}


def certificate_files(settings: Mapping[str, object]) -> dict[str, Path]:
    """Return the certificate files among a service's settings: those whose names end with `certificate` or `ca`."""
    return {
        name: value
        for name, value in settings.items()
        if isinstance(value, Path) and name.rpartition("_")[2] in {"certificate", "ca"}
    }
