"""Tokens of an issuer: valid ones of each kind of key, and every way in which one is not valid."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import threading
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from atspeed.errors import UnavailableError
from atspeed.observability import logs
from atspeed.security import json_web_tokens
from atspeed.security.callers import Caller, Grant
from atspeed.security.json_web_tokens import Issuer, JsonWebTokens, KeySet, KeySetError, _SameScheme
from atspeed.security.quotas import Quota
from atspeed.security.scopes import Scope
from tests.issuer import AUDIENCE, ISSUER, TokenIssuer, served, valid_claims

QUOTA = Quota(10, 20)


@pytest.fixture(scope="module")
def issuer() -> TokenIssuer:
    return TokenIssuer()


@pytest.fixture
def keys(issuer: TokenIssuer, tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(issuer.key_set())
    return path


async def known(source: str | Path) -> JsonWebTokens:
    keys = KeySet(str(source))
    await keys.load()
    return JsonWebTokens(Issuer(ISSUER, AUDIENCE, QUOTA), keys)


def segment(value: dict[str, Any] | bytes) -> str:
    """A part of a token, by hand."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


@pytest.mark.parametrize("key", ["rsa", "ec", "ed"])
async def test_a_valid_token_names_its_caller(issuer: TokenIssuer, keys: Path, key: str) -> None:
    tokens = await known(keys)
    assert await tokens.authenticate(issuer.token(key)) == Caller(
        "shop", "jwt", Grant(frozenset({Scope.READ}), None, QUOTA)
    )


@pytest.mark.parametrize(
    ("claims", "scopes", "tenants"),
    [
        ({"scope": " ".join(Scope)}, set(Scope), None),
        ({"scope": None, "scp": ["write"]}, {Scope.WRITE}, None),
        ({"scope": "READ reading"}, set(), None),
        ({"scope": 7, "scp": "read"}, set(), None),
        ({"tenants": ["acme", ""]}, {Scope.READ}, {"acme", ""}),
        ({"tenants": []}, {Scope.READ}, set()),
        ({"aud": ["another", AUDIENCE]}, {Scope.READ}, None),
    ],
)
async def test_scopes_and_tenants_are_claims(
    issuer: TokenIssuer, keys: Path, claims: dict[str, Any], scopes: set[Scope], tenants: set[str] | None
) -> None:
    caller = await (await known(keys)).authenticate(issuer.token(**claims))
    assert caller is not None
    assert set(caller.grant.scopes) == scopes
    assert caller.grant.tenants == (None if tenants is None else frozenset(tenants))


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": 1},
        {"exp": 1_700_000_000},
        {"exp": None},
        {"nbf": 4_000_000_000},
        {"iss": "https://login.example.attacker"},
        {"iss": None},
        {"aud": "another"},
        {"aud": None},
        {"sub": None},
        {"sub": ""},
        {"sub": "x" * 257},
        {"tenants": "acme"},
        {"tenants": [1]},
    ],
    ids=str,
)
async def test_a_token_with_other_claims_is_none(issuer: TokenIssuer, keys: Path, claims: dict[str, Any]) -> None:
    assert await (await known(keys)).authenticate(issuer.token(**claims)) is None


async def test_a_token_that_the_issuer_did_not_sign_is_none(issuer: TokenIssuer, keys: Path) -> None:
    tokens = await known(keys)
    good = issuer.token()
    head, body, signature = good.split(".")
    foreign = TokenIssuer().token()
    flipped = signature[:-2] + ("A" if signature[-2] != "A" else "B") + signature[-1]
    public = (
        issuer.private["ec"][1]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    shared = f"{segment({'alg': 'HS256', 'kid': 'ec'})}.{segment(valid_claims())}"
    forged = f"{shared}.{segment(hmac.new(public, shared.encode(), hashlib.sha256).digest())}"
    bare = f"{segment({'alg': 'none', 'kid': 'ec'})}.{segment(valid_claims())}."
    other_body = f"{head}.{segment(valid_claims(scope='admin'))}.{signature}"
    for wrong in (
        *(foreign, f"{head}.{body}.{flipped}", forged, bare, other_body, f"{head}.{body}."),
        *(
            "",
            "a",
            "a.b.c",
            "..",
            good + "x",
            good.replace(".", " "),
            "é.é.é",
            segment({"alg": "ES256", "kid": ["ec"]}) + ".e30.e30",
        ),
        *(issuer.token(headers={"kid": "unknown"}), issuer.token("rsa", headers={"kid": "ec"})),
    ):
        assert await tokens.authenticate(wrong) is None, wrong
    assert await tokens.authenticate(good) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"keys": []}',
        '{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "a"}]}',
        "\0",
        "[" * 100_000,
    ],
)
async def test_a_file_without_a_usable_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(KeySetError, match=r"keys\.json: "):
        await KeySet(str(path)).load()
    with pytest.raises(KeySetError, match="absent: FileNotFoundError"):
        await KeySet(str(tmp_path / "absent")).load()


async def test_a_replaced_file_counts_from_the_next_call_on(issuer: TokenIssuer, keys: Path) -> None:
    tokens, new = await known(keys), TokenIssuer()
    assert await tokens.authenticate(issuer.token()) is not None
    fresh = keys.with_suffix(".new")
    fresh.write_text(new.key_set())
    fresh.replace(keys)
    assert await tokens.authenticate(issuer.token()) is None
    assert await tokens.authenticate(new.token()) is not None
    fresh.write_text("no keys")
    fresh.replace(keys)
    assert await tokens.authenticate(new.token()) is not None


async def test_keys_at_a_url_are_kept_and_asked_again_for_an_unknown_id_only(issuer: TokenIssuer) -> None:
    now = [0.0]
    answers = [issuer.key_set("rsa")]
    with served(answers) as (url, asked):
        keys = KeySet(url, lambda: now[0])
        await keys.load()
        tokens = JsonWebTokens(Issuer(ISSUER, AUDIENCE), keys)
        for _ in range(5):
            assert await tokens.authenticate(issuer.token("rsa")) is not None
        assert len(asked) == 1
        answers[0] = issuer.key_set()  # the issuer has new keys
        assert await tokens.authenticate(issuer.token("ec")) is None  # asked less than ten seconds ago
        assert len(asked) == 1
        now[0] = 11
        assert await tokens.authenticate(issuer.token("ec")) is not None
        assert len(asked) == 2
        for number in range(20):
            assert await tokens.authenticate(issuer.token("ec", headers={"kid": f"invented-{number}"})) is None
        assert len(asked) == 2
        now[0] = 400
        answers[0] = ""  # the issuer fails, and its keys stay
        assert await tokens.authenticate(issuer.token("ec")) is not None
        await keys_read(keys)
        assert len(asked) == 3
        assert await tokens.authenticate(issuer.token("ec")) is not None


async def keys_read(keys: KeySet) -> None:
    """Wait for the reading in the background."""
    assert keys._reading is not None
    await keys._reading


async def test_a_silent_issuer_delays_only_calls_with_an_unknown_key(issuer: TokenIssuer) -> None:
    now, gate, answers = [0.0], threading.Event(), [issuer.key_set("rsa")]
    gate.set()
    with served(answers, gate) as (url, asked):
        keys = KeySet(url, lambda: now[0])
        await keys.load()
        tokens = JsonWebTokens(Issuer(ISSUER, AUDIENCE), keys)
        gate.clear()
        now[0] = 400
        answers[0] = issuer.key_set("ec")  # "rsa" is withdrawn
        for _ in range(3):  # the key is known, and no answer has come yet
            assert await tokens.authenticate(issuer.token("rsa")) is not None
        unknown = [asyncio.create_task(tokens.authenticate(issuer.token("ec"))) for _ in range(3)]
        given_up = asyncio.create_task(tokens.authenticate(issuer.token("ec")))
        await asyncio.sleep(0.05)
        given_up.cancel()  # its client is gone; the reading goes on for the others
        assert not any(one.done() for one in unknown)
        gate.set()
        assert None not in await asyncio.gather(*unknown)
        assert await tokens.authenticate(issuer.token("rsa")) is None
        assert asked == ["/keys"] * 2


async def test_a_key_that_was_withdrawn_while_nobody_called_is_refused_at_once(issuer: TokenIssuer) -> None:
    now, answers = [0.0], [issuer.key_set("rsa")]
    with served(answers) as (url, asked):
        keys = KeySet(url, lambda: now[0])
        await keys.load()
        tokens = JsonWebTokens(Issuer(ISSUER, AUDIENCE), keys)
        answers[0] = issuer.key_set("ec")  # "rsa" is withdrawn
        now[0] = 86_400
        assert await asyncio.gather(*[tokens.authenticate(issuer.token("rsa")) for _ in range(3)]) == [None] * 3
        assert len(asked) == 2
        answers[0] = ""  # the issuer fails, and its keys stay
        now[0] *= 2
        assert await tokens.authenticate(issuer.token("ec")) is not None


async def test_a_call_waits_for_a_silent_issuer_for_a_limited_time(
    issuer: TokenIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    gate.set()
    with served([issuer.key_set("rsa")], gate) as (url, asked):
        keys = KeySet(url, iter(range(0, 10_000, 20)).__next__)  # every look at the clock is 20 s later
        await keys.load()
        tokens = JsonWebTokens(Issuer(ISSUER, AUDIENCE), keys)
        gate.clear()
        monkeypatch.setattr(json_web_tokens, "_TIMEOUT_SECONDS", 0.05)
        for _ in range(3):
            assert await tokens.authenticate(issuer.token("ec")) is None
            assert await tokens.authenticate(issuer.token("rsa")) is not None
        gate.set()
        await keys_read(keys)
    assert 2 <= len(asked) <= 4


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"]
)
async def test_an_issuer_that_does_not_speak_http_is_an_unreadable_one(answer: bytes) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        keys = KeySet(f"http://{host}:{port}/keys")
        await keys.load()
        with pytest.raises(UnavailableError):
            await keys.key("ec")


async def test_an_issuer_that_answers_byte_by_byte_is_an_unreadable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, so a time limit for one read would never end this."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.01)

    monkeypatch.setattr(json_web_tokens, "_TIMEOUT_SECONDS", 0.2)
    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        keys = KeySet(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys")
        with pytest.raises(KeySetError, match="TimeoutError"):
            await asyncio.wait_for(keys._read(), 10)


async def test_log_lines_of_a_reading_name_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[object] = []
    keys = KeySet("https://issuer.example/keys")

    async def read() -> None:
        described.append(logs.peer())

    monkeypatch.setattr(keys, "_read", read)
    logs.bind_peer(lambda: {"peer": "10.0.0.1:5000"})
    with pytest.raises(UnavailableError):
        await keys.key("ec")
    assert described == [{}]


async def test_without_any_keys_a_call_may_come_again(issuer: TokenIssuer) -> None:
    answers, now = [""], [0.0]
    with served(answers) as (url, _):
        keys = KeySet(url, lambda: now[0])
        await keys.load()
        tokens = JsonWebTokens(Issuer(ISSUER, AUDIENCE), keys)
        with pytest.raises(UnavailableError, match="keys of the tokens' issuer"):
            await tokens.authenticate(issuer.token())
        answers[0] = issuer.key_set()
        now[0] = 11
        assert await tokens.authenticate(issuer.token()) is not None


@pytest.mark.parametrize("host", ["issuer.example", "10.0.0.7", "[fd00::1]", "localhost.example"])
def test_keys_from_another_machine_come_by_https(host: str) -> None:
    with pytest.raises(KeySetError, match="must be https, or on this machine"):
        KeySet(f"http://{host}/keys")
    KeySet(f"https://{host}/keys")


@pytest.mark.parametrize("host", ["127.0.0.1:1", "[::1]", "localhost"])
def test_keys_of_an_issuer_on_this_machine_may_come_by_http(host: str) -> None:
    KeySet(f"http://{host}/keys")


@pytest.mark.parametrize(("target", "followed"), [("http://127.0.0.1/k", True), ("https://127.0.0.1/k", False)])
def test_a_redirect_keeps_the_scheme(target: str, followed: bool) -> None:
    asked = Request("http://127.0.0.1/keys")
    found = _SameScheme().redirect_request(asked, None, 302, "Found", Message(), target)
    assert (found is not None) is followed


async def test_an_answer_of_any_size_is_not_read_to_its_end() -> None:
    with served([json.dumps({"keys": ["x" * 2_000_000]})]) as (url, _), pytest.raises(KeySetError, match="larger than"):
        await KeySet(url)._read()


def test_the_test_issuer_signs_with_another_key_each_time() -> None:
    first, second = (TokenIssuer().private["ec"][1] for _ in range(2))
    assert isinstance(first, ec.EllipticCurvePrivateKey)
    assert isinstance(second, ec.EllipticCurvePrivateKey)
    assert first.private_numbers().private_value != second.private_numbers().private_value
