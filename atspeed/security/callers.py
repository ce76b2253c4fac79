"""The caller of a call, and the ways to find out who it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from atspeed.security.quotas import Quota
from atspeed.security.scopes import Scope


@dataclass(frozen=True)
class Grant:
    """The permissions of a caller.

    Attributes:
        scopes: scopes of the caller's token.
        tenants: tenants that calls may name; None for all.
        quota: requests that the caller may make; None for no limit.
    """

    scopes: frozenset[Scope]
    tenants: frozenset[str] | None = None
    quota: Quota | None = None


@dataclass(frozen=True)
class Caller:
    """A caller that showed a valid token.

    Attributes:
        name: name of the caller in logs and quotas.
        group: label of the caller in metrics, out of a small set.
        grant: permissions of the caller.
    """

    name: str
    group: str
    grant: Grant


class Authenticator(Protocol):
    """A way to find out who shows a bearer token."""

    async def authenticate(self, token: str) -> Caller | None:
        """Return the caller; None if the token is unknown, expired or not valid here.

        Raises UnavailableError if that cannot be found out now.
        """
        ...
