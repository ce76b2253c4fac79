"""`atspeed certificates` and `atspeed token`: what they write is what a server is secured with, and a caller gets in by."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner, Result

from atspeed.cli import main
from atspeed.configuration.settings import ServiceSettings
from atspeed.local.certificates import SERVICES
from atspeed.rpc.server import running
from atspeed.security.callers import Caller, Grant
from atspeed.security.quotas import Quota
from atspeed.security.scopes import Scope
from atspeed.security.tls import ClientTls, TlsFiles, WatchedPems
from atspeed.security.tokens import Tokens, hash_token


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main.app, [str(argument) for argument in arguments])


def refusal(result: Result) -> str:
    """One line, exit code 1."""
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set as the command writes it."""
    folder = tmp_path_factory.mktemp("certificates") / "secrets"
    result = run("certificates", folder)
    assert result.exit_code == 0, result.output
    assert [Path(line) for line in result.stdout.splitlines()] == sorted(p for p in folder.rglob("*") if p.is_file())
    return folder


def test_each_service_has_a_folder_of_its_own_as_a_secret_names_its_files(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*SERVICES, "ca.crt"}
    for name in SERVICES:
        assert {path.name for path in (folder / name).iterdir()} == {"ca.crt", "tls.crt", "tls.key"}
        assert (folder / name / "tls.key").stat().st_mode & 0o077 == 0
        assert (folder / name / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()


def test_a_folder_that_is_not_empty_is_left_alone(folder: Path, tmp_path: Path) -> None:
    """Certificates of a new CA beside those of an old one: no connection would work."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert f"{folder}: is not empty" in refusal(run("certificates", folder))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("certificates", empty).exit_code == 0


def made(*arguments: object) -> tuple[str, str]:
    """A token and its entry."""
    result = run("token", *arguments)
    assert result.exit_code == 0, result.output
    (token,) = result.stdout.splitlines()
    return token, result.stderr


async def test_entries_of_several_tokens_make_a_file(tmp_path: Path) -> None:
    orders = {
        "shop": (["read", "write"], None),
        "acme.web-1": (["read"], ["acme", ""]),
        "orchestrator": (["service"], None),
    }
    path, tokens = tmp_path / "tokens.toml", {}
    with path.open("a") as file:
        for name, (scopes, tenants) in orders.items():
            chosen = [f"--scope={scope}" for scope in scopes] + [f"--tenant={tenant}" for tenant in tenants or ()]
            tokens[name], entry = made(name, *chosen)
            file.write(entry)
    found = Tokens(path)
    for name, (scopes, tenants) in orders.items():
        held = Grant(frozenset(map(Scope, scopes)), None if tenants is None else frozenset(tenants))
        assert await found.authenticate(tokens[name]) == Caller(name, name, held)
        assert tokens[name] not in path.read_text(), "the file is no secret"
    assert len(set(tokens.values())) == len(tokens)


async def test_a_quota_is_part_of_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token, entry = made("shop", "--scope=read", "--requests-per-second=0.5", "--burst=7")
    path.write_text(entry)
    caller = await Tokens(path).authenticate(token)
    assert caller is not None
    assert caller.grant.quota == Quota(0.5, 7)
    half = run("token", "shop", "--scope=read", "--burst=7")
    assert half.exit_code == 2
    assert "--burst needs --requests-per-second" in half.output


def test_a_token_as_json() -> None:
    result = run("token", "shop", "--scope=read", "--json")
    written = json.loads(result.stdout)
    assert written == {"name": "shop", "token": written["token"]}
    assert hash_token(written["token"]) in result.stderr


def test_a_token_is_another_one_every_time() -> None:
    assert made("a", "--scope=read") != made("a", "--scope=read")


@pytest.mark.parametrize("name", ["", "two words", 'a"]', "x" * 65, "a\nb"])
def test_a_name_that_no_service_would_take_is_refused(name: str) -> None:
    """The entry was printed, and the service that got it did not start."""
    result = run("token", "--scope=read", "--", name)
    assert result.exit_code == 2
    assert "'name': " in result.stderr
    assert "a name is 1 to 64 letters" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("scopes", [[], ["--scope=all"]])
def test_a_token_allows_something_that_there_is(scopes: list[str]) -> None:
    result = run("token", "shop", *scopes)
    assert result.exit_code == 2
    assert "--scope" in result.stderr
    assert "\t" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


async def asked(channel: grpc.aio.Channel, token: str) -> grpc.StatusCode:
    """How a call that needs the scope `read` ends."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # its stubs know no aio
    request = reflection_pb2.ServerReflectionRequest(list_services="")

    async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield request

    call = stub.ServerReflectionInfo(requests(), metadata=(("authorization", f"Bearer {token}"),), timeout=30)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_a_server_is_secured_by_both(folder: Path, tmp_path: Path) -> None:
    reader, entry = made("reader", "--scope=read")
    writer, other = made("writer", "--scope=write")
    (tmp_path / "tokens.toml").write_text(entry + other)
    settings = ServiceSettings(
        bundle=tmp_path,
        tls_certificate=folder / "target" / "tls.crt",
        tls_key=folder / "target" / "tls.key",
        tls_client_ca=folder / "target" / "ca.crt",
        tokens_file=tmp_path / "tokens.toml",
    )
    files = TlsFiles(*(folder / "client" / name for name in ("tls.crt", "tls.key", "ca.crt")))
    tls = ClientTls(files, server_name="target")
    credentials = WatchedPems(tls.files).current.channel_credentials()
    async with (
        running(settings, []) as server,
        grpc.aio.secure_channel(server.address, credentials, options=tls.options) as channel,
    ):
        assert await asked(channel, reader) is grpc.StatusCode.OK
        assert await asked(channel, writer) is grpc.StatusCode.PERMISSION_DENIED
        assert await asked(channel, "nobody's") is grpc.StatusCode.UNAUTHENTICATED
