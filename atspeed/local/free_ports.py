"""Free ports of this machine."""

from __future__ import annotations

import socket

_HOST = "127.0.0.1"


class PortTakenError(RuntimeError):
    """A port that is in use. The text names it."""


def free_port(wanted: int, purpose: str) -> int:
    """Return a free port: `wanted` itself unless it is 0. Raises PortTakenError if that is in use.

    purpose: the program that will listen there, for the error's text.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, wanted))
        except OSError as error:
            raise PortTakenError(f"{_HOST}:{wanted}: cannot listen for {purpose}: {error.strerror}") from None
        except OverflowError:
            raise PortTakenError(f"{wanted}: is no port; the last one is 65535, and {purpose} needs this one") from None
        return int(probe.getsockname()[1])
