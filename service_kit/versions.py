"""The versions of a service that a server has now, of which some come and go while it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

Listener = Callable[[str, bool], Awaitable[None]]
"""Hears of a version, and whether it is served from now on."""


class Versions:
    """Set by the application, followed by its server, which says so under each version's name in grpc.health.v1."""

    def __init__(self, *versions: str) -> None:
        self._served = set(versions)
        self._listeners: list[Listener] = []

    @property
    def served(self) -> frozenset[str]:
        """Those that are served now."""
        return frozenset(self._served)

    async def follow(self, listener: Listener) -> None:
        """Tell the listener of all that are served, and from now on of every change."""
        self._listeners.append(listener)
        for version in sorted(self._served):
            await listener(version, True)

    async def serve(self, version: str) -> None:
        """Calls of this version are answered from now on."""
        self._served.add(version)
        await self._tell(version, True)

    async def withdraw(self, version: str) -> None:
        """Calls of this version should go elsewhere."""
        self._served.discard(version)
        await self._tell(version, False)

    async def _tell(self, version: str, served: bool) -> None:
        for listener in self._listeners:
            await listener(version, served)
