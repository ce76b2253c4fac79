"""A channel whose certificate is renewed: no call is lost to a new one that no server takes, yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from atspeed.local.certificates import LocalCertificates
from atspeed.rpc.addresses import target_uri
from atspeed.rpc.channels import KEY_HEADER, open_channel
from atspeed.rpc.server import RunningServer, running
from atspeed.security.tls import ClientTls, TlsFiles
from tests.echo import SERVICE, Echo, call, settings
from tests.serving import LIVENESS_SECONDS

KEYED = {"metadata": ((KEY_HEADER, "a user"),), "timeout": 30}


class Witness(Echo):
    """Answers with the certificate that its caller showed."""

    async def unary_unary(self, request: StringValue, context: Any) -> StringValue:
        return StringValue(value=context.auth_context()["x509_pem_cert"][0].decode())


@asynccontextmanager
async def serving(
    folder: Path, certificates: LocalCertificates, ca: Path, port: int = 0
) -> AsyncIterator[RunningServer]:
    """A server that takes callers of `ca` alone."""
    own = certificates.files("target")
    tls = {"tls_certificate": own.certificate, "tls_key": own.key, "tls_client_ca": ca}
    async with running(settings(folder, port=port, **tls), [Witness().registration()]) as server:
        yield server


@pytest.fixture
def certificates(tmp_path: Path) -> LocalCertificates:
    return LocalCertificates(tmp_path / "ours")


@pytest.fixture
def other_authority(tmp_path: Path) -> LocalCertificates:
    """Certificates of another CA."""
    return LocalCertificates(tmp_path / "theirs")


def renewed(files: TlsFiles, source: LocalCertificates) -> str:
    """Put a new certificate of another folder in the place of the old one; what it is."""
    issued = source.issue("client")
    assert issued.certificate
    assert issued.key
    assert files.certificate
    assert files.key
    files.key.write_bytes(issued.key.read_bytes())
    files.certificate.write_bytes(issued.certificate.read_bytes())
    return first(files)


def first(files: TlsFiles) -> str:
    """The certificate without its chain."""
    assert files.certificate
    end = "-----END CERTIFICATE-----\n"
    return files.certificate.read_text().partition(end)[0] + end


@pytest.fixture
def files(tmp_path: Path, certificates: LocalCertificates) -> TlsFiles:
    """A client's, of a server that it will always believe."""
    files = TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt")
    (tmp_path / "ca.crt").write_bytes(certificates.ca.read_bytes())
    renewed(files, certificates)
    return files


@pytest.mark.parametrize("by_key", [False, True])
async def test_calls_stay_where_they_are_until_the_new_certificate_is_taken(
    tmp_path: Path, certificates: LocalCertificates, other_authority: LocalCertificates, files: TlsFiles, by_key: bool
) -> None:
    """All went over to it at once, and were lost where the server did not know its CA yet."""
    async with (
        serving(tmp_path, certificates, certificates.ca) as server,
        open_channel(target_uri(server.address), SERVICE, by_key=by_key, tls=ClientTls(files)) as channel,
    ):
        before = first(files)
        assert await call(channel, "UnaryUnary", "", **KEYED) == before
        renewed(files, other_authority)
        assert [await call(channel, "UnaryUnary", "", **KEYED) for _ in range(5)] == [before] * 5
        after = renewed(files, certificates)
        async with asyncio.timeout(LIVENESS_SECONDS):
            while (shown := await call(channel, "UnaryUnary", "", **KEYED)) == before:
                pass
        assert shown == after
        assert channel.get_state() is grpc.ChannelConnectivity.READY


async def test_an_old_channel_that_is_dead_is_left_at_once(
    tmp_path: Path, certificates: LocalCertificates, other_authority: LocalCertificates, files: TlsFiles
) -> None:
    """The restarted server trusts another CA than before."""
    async with serving(tmp_path, certificates, certificates.ca) as server:
        channel = open_channel(target_uri(server.address), SERVICE, tls=ClientTls(files))
        await call(channel, "UnaryUnary", "", timeout=30)
    after = renewed(files, other_authority)
    async with channel, serving(tmp_path, certificates, other_authority.ca, server.port):
        assert await call(channel, "UnaryUnary", "", timeout=30, wait_for_ready=True) == after
