"""The model versions that a server serves; they change while it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

Listener = Callable[[str, bool], Awaitable[None]]
"""Receives a version, and True if it takes calls from now on."""


class Versions:
    """Versions of one service. The application sets them, and the server publishes them in grpc.health.v1."""

    def __init__(self, *versions: str) -> None:
        self._served = set(versions)
        self._unhealthy: set[str] = set()
        self._listeners: list[Listener] = []

    @property
    def served(self) -> frozenset[str]:
        """Return the versions that are served."""
        return frozenset(self._served)

    async def subscribe(self, listener: Listener) -> None:
        """Call the listener for each served version now, and after every change."""
        self._listeners.append(listener)
        for version in sorted(self._served):
            await listener(version, version not in self._unhealthy)

    async def serve(self, version: str) -> None:
        """Start to serve a version."""
        self._served.add(version)
        await self._notify(version)

    async def withdraw(self, version: str) -> None:
        """Stop serving a version. Its calls should go elsewhere."""
        self._served.discard(version)
        await self._notify(version)

    async def set_healthy(self, version: str, healthy: bool) -> None:
        """Set a version's health. An unhealthy version is NOT_SERVING, and calls that arrive anyway are served."""
        if healthy:
            self._unhealthy.discard(version)
        else:
            self._unhealthy.add(version)
        await self._notify(version)

    async def _notify(self, version: str) -> None:
        serving = version in self._served and version not in self._unhealthy
        for listener in self._listeners:
            await listener(version, serving)
