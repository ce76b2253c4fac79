"""Keys that sign bundles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True)
class KeyPair:
    """The files of a key."""

    private: Path
    public: Path

    @classmethod
    def make(cls, path: Path, curve: ec.EllipticCurve | None = None) -> Self:
        """Write a new key to PATH.key and PATH.pub."""
        key = ec.generate_private_key(curve or ec.SECP256R1())
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        pair = cls(path.with_suffix(".key"), path.with_suffix(".pub"))
        pair.private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        pair.public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
        return pair
