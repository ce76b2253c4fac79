"""Connections without valid TLS are refused, and certificates change under load without an error."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from atspeed.configuration.settings import ServiceSettings
from atspeed.local.certificates import SERVICES, LocalCertificates
from atspeed.local.stack import LocalStack
from atspeed.rpc import healthcheck
from atspeed.rpc.server import running
from atspeed.security.tls import ClientTls, TlsFiles
from atspeed_client import AsyncClient, Tls
from tests.faults.conftest import Case
from tests.secured import secured_stack, write_tokens
from tests.serving import LIVENESS_SECONDS, ids


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> LocalCertificates:
    return LocalCertificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secured(
    bundle: Path, certificates: LocalCertificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalStack]:
    """Two targets: their two IPs need the name in the certificate to be another than that in the address."""
    folder = tmp_path_factory.mktemp("secured")
    write_tokens(folder / "public.toml", {"read": 'scopes = ["read"]'})
    with secured_stack(bundle, certificates, folder, targets=2) as stack:
        yield stack


def addresses(stack: LocalStack) -> list[str]:
    return [service.address for service in stack.services]


# Refusals


def test_a_client_with_a_certificate_of_the_ca_is_served(secured: LocalStack, certificates: LocalCertificates) -> None:
    for address in addresses(secured):
        assert healthcheck.state(address, tls=certificates.client()) == "SERVING"


def copied(certificates: LocalCertificates, folder: Path) -> ClientTls:
    """The client's files as they are now."""
    ours = certificates.files("client")
    paths = [Path(shutil.copy(path, folder)) for path in ours.paths]
    return ClientTls(TlsFiles(*paths))


def expired(certificates: LocalCertificates, folder: Path) -> ClientTls:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    certificates.issue("client", not_after=yesterday)
    tls = copied(certificates, folder)
    certificates.issue("client")
    return tls


def of_another_ca(certificates: LocalCertificates, folder: Path) -> ClientTls:
    theirs = LocalCertificates(folder).files("client")
    return ClientTls(TlsFiles(theirs.certificate, theirs.key, certificates.ca))


def trusting_another_ca(certificates: LocalCertificates, folder: Path) -> ClientTls:
    ours = certificates.files("client")
    return ClientTls(TlsFiles(ours.certificate, ours.key, LocalCertificates(folder).ca))


def without_a_certificate(certificates: LocalCertificates, folder: Path) -> ClientTls:
    return ClientTls(TlsFiles(ca=certificates.ca))


def expecting_another_name(certificates: LocalCertificates, folder: Path) -> ClientTls:
    return certificates.client(server_name="elsewhere")


def in_plain_text(certificates: LocalCertificates, folder: Path) -> None:
    return None


@pytest.mark.parametrize(
    "client",
    [
        expired,
        of_another_ca,
        trusting_another_ca,
        without_a_certificate,
        expecting_another_name,
        in_plain_text,
    ],
)
def test_others_do_not_get_in(
    secured: LocalStack,
    certificates: LocalCertificates,
    tmp_path: Path,
    client: Callable[[LocalCertificates, Path], ClientTls | None],
) -> None:
    tls = client(certificates, tmp_path)
    for address in addresses(secured):
        assert healthcheck.state(address, tls=tls) == "UNAVAILABLE", address
        assert healthcheck.state(address, tls=certificates.client()) == "SERVING"


async def test_an_expired_server_is_not_believed(certificates: LocalCertificates, tmp_path: Path) -> None:
    stale = LocalCertificates(tmp_path)
    stale.issue("target", not_after=datetime.now(UTC) - timedelta(days=1))
    for name, state in (("target", "UNAVAILABLE"), ("draft", "SERVING")):
        shown = stale.files(name)
        settings = ServiceSettings(bundle=tmp_path, tls_certificate=shown.certificate, tls_key=shown.key)
        async with running(settings, []) as server:
            assert await asyncio.to_thread(healthcheck.state, server.address, tls=stale.client()) == state


# Rotation


@dataclass
class Load:
    """Lists asked for one after another by several clients until told to stop; every error ends the test."""

    client: AsyncClient
    cases: list[Case]
    answered: int = 0
    answer: asyncio.Condition = field(default_factory=asyncio.Condition)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, first: int) -> None:
        number = first
        while not self.stopping.is_set():
            case = self.cases[number % len(self.cases)]
            reply = await self.client.recommend(history=case.history, k=20)
            assert reply.item_ids == ids(case.expected)
            number += 1
            async with self.answer:
                self.answered += 1
                self.answer.notify_all()

    async def more(self, lists: int) -> None:
        """Until so many more have been answered."""
        until = self.answered + lists
        async with asyncio.timeout(LIVENESS_SECONDS), self.answer:
            await self.answer.wait_for(lambda: self.answered >= until)


def client_tls(tls: ClientTls) -> Tls:
    """The client's form of TLS settings."""
    files = tls.files
    return Tls(ca=files.ca, certificate=files.certificate, key=files.key, server_name=tls.server_name)


async def leaf_of(address: str, tls: ClientTls) -> bytes:
    """The certificate that a server shows now."""
    context = ssl.create_default_context(cafile=tls.files.ca)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    assert tls.files.certificate
    context.load_cert_chain(tls.files.certificate, tls.files.key)
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return bytes(shown)


def first_certificate(path: Path | None) -> bytes:
    assert path
    text = path.read_text()
    end = "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(text[: text.index(end) + len(end)])


async def test_certificates_and_their_ca_change_under_load(
    secured: LocalStack, certificates: LocalCertificates, cases: list[Case], tmp_path: Path
) -> None:
    """First new certificates of the same CA, then a new CA: trusted beside the old one, used, and then trusted alone."""
    tls = certificates.client()
    assert tls.files.ca
    before = copied(certificates, tmp_path)
    async with AsyncClient(
        secured.address, tls=client_tls(tls), token="hush-read", timeout_seconds=LIVENESS_SECONDS
    ) as client:
        load = Load(client, cases)
        async with asyncio.TaskGroup() as clients:
            for first in range(4):
                clients.create_task(load.run(first * 5))
            await load.more(20)
            for name in SERVICES:
                certificates.issue(name)
                await load.more(3)
            for service in secured.services:
                name = service.module.removesuffix("_service")
                shown = await leaf_of(service.address, tls)
                assert shown == first_certificate(certificates.files(name).certificate)
            with certificates.new_authority():
                await load.more(20)
                for name in SERVICES:
                    certificates.issue(name)
                    await load.more(3)
            await load.more(20)
            load.stopping.set()
    assert load.answered >= 90
    for address in addresses(secured):
        assert healthcheck.state(address, tls=certificates.client()) == "SERVING"
        assert healthcheck.state(address, tls=before) == "UNAVAILABLE"  # of the old CA, which nobody trusts any more
