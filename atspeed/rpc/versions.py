"""The versions of a service that a server has now, of which some come and go while it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

Listener = Callable[[str, bool], Awaitable[None]]
"""Hears of a version, and whether it takes calls from now on."""


class Versions:
    """Set by the application, followed by its server, which says so under each version's name in grpc.health.v1."""

    def __init__(self, *versions: str) -> None:
        self._served = set(versions)
        self._unfit: set[str] = set()
        self._listeners: list[Listener] = []

    @property
    def served(self) -> frozenset[str]:
        """Those that are served now."""
        return frozenset(self._served)

    async def follow(self, listener: Listener) -> None:
        """Tell the listener of all that are served, and from now on of every change."""
        self._listeners.append(listener)
        for version in sorted(self._served):
            await listener(version, version not in self._unfit)

    async def serve(self, version: str) -> None:
        """Calls of this version are answered from now on."""
        self._served.add(version)
        await self._tell(version)

    async def withdraw(self, version: str) -> None:
        """Calls of this version should go elsewhere."""
        self._served.discard(version)
        await self._tell(version)

    async def declare_fit(self, version: str, fit: bool) -> None:
        """Whether passes of this version work. While they do not, its calls should go elsewhere; it is served all the same."""
        if fit:
            self._unfit.discard(version)
        else:
            self._unfit.add(version)
        await self._tell(version)

    async def _tell(self, version: str) -> None:
        wanted = version in self._served and version not in self._unfit
        for listener in self._listeners:
            await listener(version, wanted)
