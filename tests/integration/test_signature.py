"""Signatures of bundles, with OpenSSF's own program as the other side."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from atspeed.artefacts.bundle_source import LinkSource
from atspeed.artefacts.signature import KeyFileError, TrustedKeys, sign_bundle
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import MANIFEST, SIGNATURE
from atspeed.engine.errors import BundleError
from tests.catalogues import random_catalogue
from tests.placeholder_bundles import placeholder_bundle
from tests.signing_keys import KeyPair

signing = pytest.importorskip("model_signing.signing")
verifying = pytest.importorskip("model_signing.verifying")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return placeholder_bundle(tmp_path / "bundle", random_catalogue(20, (4, 4), seed=0))


@pytest.fixture
def ours(tmp_path: Path) -> KeyPair:
    return KeyPair.make(tmp_path / "ours")


def checked(bundle: Bundle, keys: Path) -> str:
    """The version of a bundle whose signature is checked."""
    named = LinkSource(bundle.root, TrustedKeys(keys)).look()
    assert named
    return named.version()


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_a_signed_bundle_is_taken_here_and_by_model_signing(
    bundle: Bundle, tmp_path: Path, curve: ec.EllipticCurve
) -> None:
    key = KeyPair.make(tmp_path / "key", curve)
    (bundle.root / "README.md").write_text("a note")
    sign_bundle(bundle.root, key.private)
    assert checked(bundle, key.public) == bundle.manifest.version
    verifying.Config().use_elliptic_key_verifier(public_key=key.public).verify(bundle.root, bundle.root / SIGNATURE)
    bundle.verify()


def test_a_bundle_signed_by_model_signing_is_taken(bundle: Bundle, ours: KeyPair) -> None:
    signing.Config().use_elliptic_key_signer(private_key=ours.private).sign(bundle.root, bundle.root / SIGNATURE)
    assert checked(bundle, ours.public) == bundle.manifest.version


def test_model_signing_finds_a_file_that_changed_after_our_signature(bundle: Bundle, ours: KeyPair) -> None:
    sign_bundle(bundle.root, ours.private)
    file = bundle.root / next(iter(bundle.manifest.files))
    file.write_bytes(file.read_bytes() + b"!")
    with pytest.raises(ValueError, match="Signature mismatch"):
        verifying.Config().use_elliptic_key_verifier(public_key=ours.public).verify(
            bundle.root, bundle.root / SIGNATURE
        )


def test_one_of_several_keys_is_enough_so_that_keys_can_change(bundle: Bundle, tmp_path: Path, ours: KeyPair) -> None:
    other = KeyPair.make(tmp_path / "other")
    both = tmp_path / "both.pub"
    both.write_bytes(other.public.read_bytes() + ours.public.read_bytes())
    sign_bundle(bundle.root, ours.private)
    assert checked(bundle, both)
    with pytest.raises(BundleError, match=r"model\.sig: not signed by a key of .*other\.pub"):
        checked(bundle, other.public)


def test_every_byte_of_the_manifest_counts(bundle: Bundle, ours: KeyPair) -> None:
    sign_bundle(bundle.root, ours.private)
    path = bundle.root / MANIFEST
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(BundleError, match="the signature of another manifest"):
            checked(bundle, ours.public)


def test_no_changed_or_cut_signature_is_taken(bundle: Bundle, ours: KeyPair) -> None:
    sign_bundle(bundle.root, ours.private)
    path = bundle.root / SIGNATURE
    envelope = json.loads(path.read_text())
    inner = envelope["dsseEnvelope"]
    payload = base64.b64decode(inner["payload"])
    wrong = [b"", b"{}", b"[" * 100_000, b"[]", b"null", b"\xff", path.read_bytes()[:-40], path.read_bytes()[:200]]
    changed: list[dict[str, object]] = [
        {"payload": base64.b64encode(payload.replace(b"sha256", b"sha257", 1)).decode()},
        {"signatures": []},
        {"signatures": [{"sig": ""}]},
        {"signatures": [{"sig": "?"}]},
        {"signatures": 3},
        {"payloadType": "text/plain"},
        {"payload": None},
    ]
    wrong += [json.dumps({**envelope, "dsseEnvelope": {**inner, **part}}).encode() for part in changed]
    for content in wrong:
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"model\.sig: not "):
            checked(bundle, ours.public)
    path.unlink()
    with pytest.raises(BundleError, match=r"model\.sig: missing, but .*ours\.pub asks for signed bundles"):
        checked(bundle, ours.public)


def test_a_signature_over_other_statements_of_the_same_key_is_refused(bundle: Bundle, ours: KeyPair) -> None:
    """A key may sign other things than models."""
    sign_bundle(bundle.root, ours.private)
    path = bundle.root / SIGNATURE
    envelope = json.loads(path.read_text())
    key = serialization.load_pem_private_key(ours.private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    from cryptography.hazmat.primitives import hashes

    for payload in (b"not JSON", b"[]", b'{"predicateType": "https://slsa.dev/provenance/v1"}'):
        kind = envelope["dsseEnvelope"]["payloadType"].encode()
        signed = key.sign(
            b" ".join([b"DSSEv1", b"%d" % len(kind), kind, b"%d" % len(payload), payload]), ec.ECDSA(hashes.SHA256())
        )
        envelope["dsseEnvelope"] |= {
            "payload": base64.b64encode(payload).decode(),
            "signatures": [{"sig": base64.b64encode(signed).decode()}],
        }
        path.write_text(json.dumps(envelope))
        with pytest.raises(BundleError, match="the signature of another manifest"):
            checked(bundle, ours.public)


def test_a_damaged_bundle_is_not_signed(bundle: Bundle, ours: KeyPair) -> None:
    file = bundle.root / next(iter(bundle.manifest.files))
    file.write_bytes(b"other")
    with pytest.raises(BundleError, match="differs from the manifest"):
        sign_bundle(bundle.root, ours.private)
    assert not (bundle.root / SIGNATURE).exists()


def test_files_that_are_no_keys_are_named(bundle: Bundle, tmp_path: Path, ours: KeyPair) -> None:
    rsa_key = rsa.generate_private_key(65537, 2048)
    form, public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    encrypted = subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", str(ours.private), "-passout", "pass:secret"],
        check=True,
        capture_output=True,
    ).stdout
    for content, text in (
        (b"", "no public key in PEM"),
        (ours.private.read_bytes(), "no public key in PEM"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a public key in PEM"),
        (rsa_key.public_key().public_bytes(form, public), "not a key on P-256"),
    ):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(KeyFileError, match=f"file: {text}"):
            TrustedKeys(tmp_path / "file")
    for content, text in ((encrypted, "the key is encrypted"), (ours.public.read_bytes(), "not a private key in PEM")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(KeyFileError, match=f"file: {text}"):
            sign_bundle(bundle.root, tmp_path / "file")
    with pytest.raises(KeyFileError, match="nowhere: No such file"):
        TrustedKeys(tmp_path / "nowhere")
