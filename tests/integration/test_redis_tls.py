"""Redis behind TLS, with client certificates: a real Redis behind a TLS proxy, since its wheel has no TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from atspeed.engine.kv.redis_client import RedisTls, connect
from atspeed.local.certificates import LocalCertificates


class TlsProxy:
    """Takes mutual TLS on a port of this machine and passes it on in plain text."""

    def __init__(self, certificates: LocalCertificates, redis_port: int) -> None:
        self._certificates, self._redis_port = certificates, redis_port
        self._open: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """The URL."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.context())
        try:
            yield f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        finally:
            server.close()
            self.hang_up()

    def context(self) -> ssl.SSLContext:
        own = self._certificates.files("redis")
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=own.ca)
        self._context.verify_mode = ssl.CERT_REQUIRED
        assert own.certificate
        self._context.load_cert_chain(own.certificate, own.key)
        return self._context

    def trust_also(self, ca: Path) -> None:
        self._context.load_verify_locations(ca)

    def hang_up(self) -> None:
        for writer in self._open:
            writer.close()
        self._open.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        redis_reader, redis_writer = await asyncio.open_connection("127.0.0.1", self._redis_port)
        self._open += [writer, redis_writer]
        await asyncio.gather(_copy(reader, redis_writer), _copy(redis_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, ssl.SSLError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def ping(url: str, tls: RedisTls | None) -> bool:
    client = connect(url, timeout_seconds=20, tls=tls)
    try:
        return bool(await client.ping())
    except (RedisConnectionError, ssl.SSLError):
        return False
    finally:
        await client.aclose()


def shown(certificates: LocalCertificates, ca: Path) -> RedisTls:
    own = certificates.files("client")
    return RedisTls(ca=ca, certificate=own.certificate, key=own.key)


@pytest.fixture
def redis_port(redis_url: str) -> int:
    return int(redis_url.rpartition(":")[2].partition("/")[0])


async def test_both_sides_show_certificates_of_the_ca(redis_port: int, tmp_path: Path) -> None:
    ours, theirs = LocalCertificates(tmp_path / "ours"), LocalCertificates(tmp_path / "theirs")
    async with TlsProxy(ours, redis_port).serving() as url:
        assert await ping(url, shown(ours, ours.ca))
        assert not await ping(url, None)
        assert not await ping(url, RedisTls(ca=ours.ca))
        assert not await ping(url, shown(ours, theirs.ca))
        assert not await ping(url, shown(theirs, ours.ca))
        assert not await ping(url.replace("rediss", "redis"), None)


async def test_a_renewed_certificate_is_shown_from_the_next_connection_on(redis_port: int, tmp_path: Path) -> None:
    """Also on a connection of the pool that has been one before."""
    ours = LocalCertificates(tmp_path)
    proxy = TlsProxy(ours, redis_port)
    async with proxy.serving() as url:
        client = connect(url, timeout_seconds=20, tls=shown(ours, ours.ca))
        assert await client.ping()
        with ours.new_authority():
            ours.issue("client")
            proxy.trust_also(ours.ca)
            proxy.hang_up()
            with suppress(RedisConnectionError):
                await client.ping()  # finds the connection closed
            assert await client.ping()
        await client.aclose()
