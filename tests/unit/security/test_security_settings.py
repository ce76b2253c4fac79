"""Settings of TLS and tokens that are half there, and files that are not what they should be, before anything listens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from atspeed.configuration.settings import ServiceSettings
from atspeed.errors import StartupError
from atspeed.local.certificates import LocalCertificates
from atspeed.rpc.server import running
from atspeed.security.callers import Caller, Grant
from atspeed.security.quotas import LARGEST_CALL, Quota
from atspeed.security.scopes import Scope
from atspeed.security.tls import ClientTls, TlsError, TlsFiles, WatchedPems
from atspeed.security.tokens import TokenError, TokenFile, Tokens, hash_token, new_token, read_tokens
from orchestrator.settings import OrchestratorSettings
from target_service.settings import TargetSettings


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> LocalCertificates:
    return LocalCertificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(f'[a]\nsha256 = "{hash_token("t")}"\nscopes = ["read"]\n')
    return path


EVERYWHERE = "0.0.0.0"  # noqa: S104
CERTIFICATE, KEY, CA = "target/tls.crt", "target/tls.key", "ca.crt"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tls-certificate": CERTIFICATE}, "--tls-certificate (ATSPEED_TARGET_TLS_CERTIFICATE) and --tls-key"),
        ({"tls-key": KEY}, "must be set together"),
        ({"tls-client-ca": CA}, "--tls-client-ca (ATSPEED_TARGET_TLS_CLIENT_CA) needs --tls-certificate"),
        ({"redis-ca": CA, "redis-url": "redis://r"}, "needs --redis-url (ATSPEED_TARGET_REDIS_URL) rediss://"),
        ({"redis-certificate": CERTIFICATE, "redis-url": "rediss://r"}, "--redis-key"),
        ({"tls-certificate": "absent.pem", "tls-key": KEY}, "--tls-certificate"),
        ({"tokens-file": "absent.toml"}, "--tokens-file"),
        ({"host": EVERYWHERE}, "--host (ATSPEED_TARGET_HOST): beyond loopback one of these must be set: --tokens-file"),
        ({"host": "target.local"}, "--insecure (ATSPEED_TARGET_INSECURE)"),
        ({"host": "::"}, "--tls-client-ca"),
        ({"trusted-proxies": "envoy"}, "--trusted-proxies (ATSPEED_TARGET_TRUSTED_PROXIES): must be IP addresses"),
        ({"trusted-proxies": "10,0,0,1/8"}, "--trusted-proxies"),
    ],
)
def test_half_a_setting_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    certificates: LocalCertificates,
    given: dict[str, str],
    named: str,
) -> None:
    in_folder = {
        name: certificates.folder / value if "." in value and name != "host" else value for name, value in given.items()
    }
    with pytest.raises(SystemExit) as caught:
        TargetSettings.load([f"--bundle={tmp_path}", *(f"--{name}={value}" for name, value in in_folder.items())])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_this_machine_needs_no_tokens(tmp_path: Path, host: str) -> None:
    assert TargetSettings(bundle=tmp_path, host=host).loopback


def test_beyond_it_any_of_three_will_do(tmp_path: Path, certificates: LocalCertificates, tokens: Path) -> None:
    own = certificates.files("target")
    TargetSettings(bundle=tmp_path, host=EVERYWHERE, insecure=True)
    TargetSettings(bundle=tmp_path, host=EVERYWHERE, tokens_file=tokens)
    TargetSettings(
        bundle=tmp_path, host=EVERYWHERE, tls_certificate=own.certificate, tls_key=own.key, tls_client_ca=own.ca
    )
    with pytest.raises(ValidationError):  # TLS alone says nothing of who calls
        TargetSettings(bundle=tmp_path, host=EVERYWHERE, tls_certificate=own.certificate, tls_key=own.key)


def test_the_models_settings_go_together_too(tmp_path: Path, certificates: LocalCertificates) -> None:
    own = certificates.files("orchestrator")
    with pytest.raises(ValidationError, match=r"--model-certificate .* needs --model-ca"):
        OrchestratorSettings(bundle=tmp_path, target="target:1", model_certificate=own.certificate, model_key=own.key)
    with pytest.raises(ValidationError, match="target-name"):
        OrchestratorSettings(bundle=tmp_path, target="target:1", target_name="target")
    whole = OrchestratorSettings(bundle=tmp_path, target="target:1", model_ca=own.ca, target_name="t")
    assert whole.model_tls(whole.target_name) == ClientTls(TlsFiles(ca=own.ca), "t")


async def test_a_server_does_not_start_on_what_is_no_certificate(
    tmp_path: Path, certificates: LocalCertificates
) -> None:
    own, other = certificates.files("target"), certificates.files("draft")
    settings = ServiceSettings(bundle=tmp_path, tls_certificate=own.certificate, tls_key=other.key)
    with pytest.raises(
        StartupError, match=r"--tls-certificate .*: .*target/tls.crt and .*draft/tls.key: key values mismatch"
    ):
        async with running(settings, []):
            pass


async def test_a_server_does_not_start_on_tokens_that_it_cannot_read(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("[a]\nscopes = 1\n")
    with pytest.raises(StartupError, match=r"--tokens-file .*: .*tokens.toml: invalid: a.sha256, a.scopes"):
        async with running(ServiceSettings(bundle=tmp_path, tokens_file=tokens), []):
            pass


# Files


@pytest.mark.parametrize(
    "content", [b"", b"not pem", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_ca_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pem"
    path.write_bytes(content)
    with pytest.raises(TlsError, match=r"broken\.pem: "):
        WatchedPems(TlsFiles(ca=path))


def test_an_encrypted_key_is_refused_and_asks_nobody(tmp_path: Path, certificates: LocalCertificates) -> None:
    from cryptography.hazmat.primitives import serialization

    own = certificates.files("target")
    assert own.key
    key = serialization.load_pem_private_key(own.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    with pytest.raises(TlsError, match=r"locked\.key"):
        WatchedPems(TlsFiles(own.certificate, locked))


def test_new_files_are_used_once_they_fit_together(tmp_path: Path) -> None:
    """A certificate and its key are two files: a replacement has a moment with one of each."""
    ours, theirs = LocalCertificates(tmp_path / "a"), LocalCertificates(tmp_path / "b")
    own, new = ours.files("target"), theirs.files("target")
    assert own.certificate and own.key and new.certificate and new.key  # noqa: PT018
    watched = WatchedPems(own)
    before = watched.current
    assert not watched.changed()
    own.key.write_bytes(new.key.read_bytes())
    assert not watched.changed()
    assert watched.current == before
    own.certificate.write_bytes(new.certificate.read_bytes())
    assert watched.changed()
    assert watched.current.certificate == new.certificate.read_bytes()
    own.key.unlink()
    assert not watched.changed()
    assert not watched.changed()


# Tokens


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[a",
        "a = 1",
        f"a = {'[' * 5000}",
        '[a]\nsha256 = "hush"\nscopes = ["read"]',
        f'[a]\nsha256 = "{"0" * 64}"\nscopes = []',
        f'[a]\nsha256 = "{"0" * 64}"\nscopes = ["all"]',
        f'[a]\nsha256 = "{"0" * 64}"\nscopes = ["read"]\nexpires = 2027-01-01T00:00:00',
        f'[a]\nsha256 = "{"0" * 64}"\nscopes = ["read"]\ntenant = ["misspelt"]',
        f'[a]\nsha256 = "{"0" * 64}"\nscopes = ["read"]\nburst = 5',
        f'[a]\nsha256 = "{"0" * 64}"\nscopes = ["read"]\nrequests_per_second = 0',
        f'["a b"]\nsha256 = "{"0" * 64}"\nscopes = ["read"]',
    ],
)
def test_tokens_that_are_not_right_are_refused_and_not_quoted(tokens: Path, text: str) -> None:
    tokens.write_text(text)
    with pytest.raises(TokenError, match=r"tokens\.toml: ") as refusal:
        read_tokens(tokens)
    assert "hush" not in str(refusal.value)


async def test_a_token_is_known_by_its_hash(tokens: Path) -> None:
    known = Tokens(tokens)
    found = await known.authenticate("t")
    assert found == Caller("a", "a", Grant(frozenset({Scope.READ})))
    for other in ("", "T", "t ", hash_token("t"), "é", "\udcff"):
        assert await known.authenticate(other) is None
    assert hash_token("t") not in repr(read_tokens(tokens))


@pytest.mark.parametrize(
    ("lines", "quota"),
    [
        ("requests_per_second = 50", Quota(50, 100)),
        ("requests_per_second = 0.1", Quota(0.1, LARGEST_CALL)),
        ("requests_per_second = 50\nburst = 5", Quota(50, 5)),
        ("", None),
    ],
)
def test_a_quota_has_a_burst_of_two_seconds_unless_it_says_so(tokens: Path, lines: str, quota: Quota | None) -> None:
    tokens.write_text(tokens.read_text() + "\n" + lines)
    assert read_tokens(tokens)["a"].grant.quota == quota


def test_a_token_to_show_follows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("\n")
    with pytest.raises(TokenError, match="holds no token"):
        TokenFile(path)
    path.write_text("first\n")
    token = TokenFile(path)
    assert token() == "first"
    path.write_text("second")
    os.utime(path, ns=(1, 1))
    assert token() == "second"
    fresh = tmp_path / "fresh"
    fresh.write_text("third")
    os.utime(fresh, ns=(1, 1))
    fresh.rename(path)  # within one tick of the file system's clock: the same time of change
    assert token() == "third"
    path.write_text("second")
    assert token() == "second"
    path.unlink()
    assert token() == "second"


def test_new_tokens_are_long_and_differ() -> None:
    made = {new_token() for _ in range(100)}
    assert len(made) == 100
    assert all(len(token) >= 43 and token.isascii() for token in made)


def test_files_of_tokens_with_a_byte_order_mark_are_read(tokens: Path, tmp_path: Path) -> None:
    """Some editors write one; it was the beginning of the first name, or no ASCII."""
    plain = read_tokens(tokens)
    tokens.write_bytes(b"\xef\xbb\xbf" + tokens.read_bytes())
    assert read_tokens(tokens) == plain
    (tmp_path / "shown").write_bytes(b"\xef\xbb\xbfsecret\r\n")
    assert TokenFile(tmp_path / "shown")() == "secret"
