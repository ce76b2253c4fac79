"""Ports of this machine that nobody listens on."""

from __future__ import annotations

import socket

_HOST = "127.0.0.1"


class PortTakenError(RuntimeError):
    """A port that somebody listens on. The text names it."""


def free_port(wanted: int, purpose: str) -> int:
    """Return a port that nobody listens on: `wanted` itself, unless it is 0. Raises PortTakenError.

    purpose: the one who is to listen there, for the error.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, wanted))
        except OSError as error:
            raise PortTakenError(f"{_HOST}:{wanted}: cannot listen for {purpose}: {error.strerror}") from None
        return int(probe.getsockname()[1])
