"""Signatures of bundles, in OpenSSF's format with a key of one's own.

The file `model.sig` is a Sigstore bundle: a DSSE envelope over an in-toto statement with the SHA-256 of every file. It is checked
here against the manifest alone, which holds the hashes of all other files. `model_signing verify key` checks the whole folder.
The format: https://github.com/sigstore/model-transparency, https://github.com/secure-systems-lab/dsse.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import MANIFEST, SIGNATURE, hash_files
from atspeed.engine.errors import BundleError
from atspeed.engine.files.atomic_write import replacing

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)
_Hash: TypeAlias = hashes.SHA256 | hashes.SHA384 | hashes.SHA512
_HASHES: Mapping[str, type[_Hash]] = {
    "secp256r1": hashes.SHA256,
    "secp384r1": hashes.SHA384,
    "secp521r1": hashes.SHA512,
}


class KeyFileError(BundleError):
    """A file of keys that cannot be used. The text names the file."""


class TrustedKeys:
    """Public keys of which one must have signed a bundle.

    Raises KeyFileError for a file without a public key on P-256, P-384 or P-521.
    """

    def __init__(self, path: Path) -> None:
        content = _read_key(path)
        self._path = path
        self._keys = [_public_key(path, pem) for pem in _PEM.findall(content)]
        if not self._keys:
            raise KeyFileError(f"{path}: no public key in PEM")

    def check(self, place: str, manifest: bytes, signature: bytes | None) -> None:
        """Raise BundleError unless `signature` is that of a trusted key over `manifest`.

        Args:
            place: the bundle's folder or URL, for messages.
            manifest: the content of manifest.json.
            signature: the content of model.sig; None if there is none.
        """
        where = f"{place}/{SIGNATURE}"
        if signature is None:
            raise BundleError(f"{where}: missing, but {self._path} asks for signed bundles")
        try:
            payload, signatures = _opened(signature)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"{where}: not a signature in the format of OpenSSF model signing") from error
        if not any(_is_by(key, one, payload) for key in self._keys for one in signatures):
            raise BundleError(f"{where}: not signed by a key of {self._path}")
        if _signed_digest(payload) != hashlib.sha256(manifest).hexdigest():
            raise BundleError(f"{where}: the signature of another {MANIFEST}")


def sign_bundle(root: Path, key: Path) -> None:
    """Check a bundle's files, and write model.sig. Raises BundleError naming the file that differs, or KeyFileError.

    key: an unencrypted private key on P-256, P-384 or P-521, in PEM.
    """
    private = _private_key(key)
    Bundle(root).verify()
    content = (root / MANIFEST).read_bytes()
    digests = hash_files(root)
    digests[MANIFEST] = hashlib.sha256(content).hexdigest()
    payload = json.dumps(_statement(root.resolve().name, digests)).encode()
    signed = private.sign(_encoded(payload), ec.ECDSA(_hash_of(private.curve)))
    envelope = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _hint(private.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signed).decode(), "keyid": ""}],
        },
    }
    with replacing(root / SIGNATURE) as file:
        file.write(json.dumps(envelope).encode())


def _statement(name: str, digests: Mapping[str, str]) -> dict[str, object]:
    """Return the in-toto statement over files, by their SHA-256."""
    together = hashlib.sha256(b"".join(bytes.fromhex(digests[file]) for file in sorted(digests))).hexdigest()
    files = [{"name": file, "algorithm": "sha256", "digest": digests[file]} for file in sorted(digests)]
    ways = {"method": "files", "hash_type": "sha256", "allow_symlinks": True, "ignore_paths": [SIGNATURE]}
    return {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": together}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {"serialization": ways, "resources": files},
    }


def _opened(signature: bytes) -> tuple[bytes, Sequence[bytes]]:
    """Return the payload of an envelope and its signatures."""
    envelope = json.loads(signature)["dsseEnvelope"]
    if envelope["payloadType"] != _PAYLOAD_TYPE:
        raise ValueError(envelope["payloadType"])
    decoded = [base64.b64decode(one["sig"], validate=True) for one in envelope["signatures"]]
    return base64.b64decode(envelope["payload"], validate=True), decoded


def _signed_digest(payload: bytes) -> str | None:
    """Return the SHA-256 of manifest.json in a statement that a trusted key has signed; None without one."""
    try:
        statement: Any = json.loads(payload)
        if statement["predicateType"] != _PREDICATE_TYPE:
            return None
        files = {file["name"]: file for file in statement["predicate"]["resources"]}
        file = files[MANIFEST]
        return str(file["digest"]) if file["algorithm"] == "sha256" else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _encoded(payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _is_by(key: ec.EllipticCurvePublicKey, signature: bytes, payload: bytes) -> bool:
    try:
        key.verify(signature, _encoded(payload), ec.ECDSA(_hash_of(key.curve)))
    except InvalidSignature:
        return False
    return True


def _hint(key: ec.EllipticCurvePublicKey) -> str:
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _hash_of(curve: ec.EllipticCurve) -> _Hash:
    return _HASHES[curve.name]()


def _public_key(path: Path, pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm, binascii.Error) as error:
        raise KeyFileError(f"{path}: not a public key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
        raise KeyFileError(f"{path}: not a key on P-256, P-384 or P-521")
    return key


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read_key(path), None)
    except TypeError as error:
        raise KeyFileError(
            f"{path}: the key is encrypted; give a decrypted one, such as by a process substitution"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path}: not a private key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _HASHES:
        raise KeyFileError(f"{path}: not a key on P-256, P-384 or P-521")
    return key


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error
