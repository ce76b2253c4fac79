"""A TCP proxy before Redis, which can lead elsewhere, fall silent or answer by itself, with its connections left open."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

_COMMAND = re.compile(rb"\*\d+\r\n\$")


@dataclass(eq=False)
class _Line:
    """One client's connection.

    canned: what every command is answered with. swallows: whether nothing passes. mute: whether only commands do.
    """

    canned: bytes = b""
    swallows: bool = False
    mute: bool = False


class RedisProxy:
    """One address for a Redis, on a thread of its own: tests that block and tests of an event loop alike talk to it.

    What is set for connections holds for those that are open; later ones are passed on as they come.
    """

    def __init__(self, url: str) -> None:
        self._port = _port(url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="redis-proxy", daemon=True)
        self._lines: set[_Line] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The address, which stays the same."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def open(self) -> int:
        """How many connections clients hold."""
        return len(self._lines)

    def leads_to(self, url: str) -> None:
        """New connections go to this server, open ones stay where they are."""
        self._port = _port(url)

    def swallow(self) -> None:
        """Open connections stay open and nothing passes any more, in no direction."""
        self._each(lambda line: setattr(line, "swallows", True))

    def mute(self) -> None:
        """Commands on open connections are executed, and their answers get lost."""
        self._each(lambda line: setattr(line, "mute", True))

    def answer(self, text: bytes) -> None:
        """Every command on an open connection is answered with this, and reaches no server."""
        self._each(lambda line: setattr(line, "canned", text))

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _each(self, change: Callable[[_Line], None]) -> None:
        for line in tuple(self._lines):
            change(line)

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        line = _Line()
        self._lines.add(line)
        try:
            server = await asyncio.open_connection("127.0.0.1", self._port)
            pumps = [asyncio.create_task(_commands(line, reader, server[1], writer))]
            pumps.append(asyncio.create_task(_answers(line, server[0], writer)))
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                server[1].close()  # first: the wait below may be cancelled
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._lines.discard(line)
            self._tasks.discard(task)
            writer.close()


async def _commands(
    line: _Line, reader: asyncio.StreamReader, server: asyncio.StreamWriter, client: asyncio.StreamWriter
) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            if line.canned:
                client.write(line.canned * len(_COMMAND.findall(data)))
            elif not line.swallows:
                server.write(data)
                await server.drain()


async def _answers(line: _Line, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await server.read(65_536):
            if not (line.swallows or line.mute):
                client.write(data)
                await client.drain()


def _port(url: str) -> int:
    port = urlsplit(url).port
    assert port
    return port
