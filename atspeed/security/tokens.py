"""Reads bearer tokens from a TOML file, and again when the file changes.

    [shop]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    scopes = ["read", "write"]
    tenants = ["acme"]                   # the only tenants that calls may name; default: all
    expires = 2027-01-31T00:00:00Z       # default: never
    requests_per_second = 50             # of one replica; default: no limit
    burst = 200                          # requests at once; default: those of two seconds, 3 at least

The hash covers the whole token. A plain SHA-256 is enough, as `new_token` has 256 random bits.
"""

from __future__ import annotations

import codecs
import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Self

import structlog
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from atspeed.security.callers import Caller, Grant
from atspeed.security.file_watch import FileSignature, file_signature
from atspeed.security.quotas import quota_of
from atspeed.security.scopes import Scope

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class TokenError(ValueError):
    """A token file that cannot be used. The text names the file and the mistake, and quotes no value."""


class TokenEntry(BaseModel):
    """A token of the file.

    Attributes:
        sha256: hash of the token, in hex.
        scopes: scopes of the token.
        tenants: tenants that calls may name; None for all.
        expires: end of the token's validity; None for never.
        requests_per_second: requests that the caller may make; None for no limit.
        burst: requests that the caller may make at once; None for those of two seconds, and three at least.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", repr=False)]
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    tenants: frozenset[str] | None = None
    expires: AwareDatetime | None = None
    requests_per_second: Annotated[float, Field(gt=0, le=1e6)] | None = None
    burst: Annotated[float, Field(ge=1, le=1e6)] | None = None

    @model_validator(mode="after")
    def _burst_of_a_rate(self) -> Self:
        if self.burst is not None and self.requests_per_second is None:
            raise ValueError("burst needs requests_per_second")
        return self

    @property
    def grant(self) -> Grant:
        """Return the permissions of the token."""
        return Grant(self.scopes, self.tenants, quota_of(self.requests_per_second, self.burst))

    def expired(self, now: datetime) -> bool:
        """Return whether the token has expired."""
        return self.expires is not None and self.expires <= now


TOKEN_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_Entries = TypeAdapter(dict[Annotated[str, Field(pattern=f"^{TOKEN_NAME.pattern}$")], TokenEntry])


class Tokens:
    """The tokens of a file, which is checked for changes before each use. Raises TokenError for a bad file at first.

    A bad file later is logged and ignored, and the earlier tokens stay valid.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = file_signature(path)
        self._entries = read_tokens(path)

    async def authenticate(self, token: str) -> Caller | None:
        """Return the caller of a token; None if it is unknown or expired.

        Every hash is compared, each in constant time, so the duration reveals nothing about the tokens.
        """
        self._refresh()
        digest, found = hash_token(token), None
        for name, entry in self._entries.items():
            if hmac.compare_digest(digest, entry.sha256) and not entry.expired(datetime.now(UTC)):
                found = Caller(name, name, entry.grant)
        return found

    def _refresh(self) -> None:
        if (found := file_signature(self._path)) == self._seen:
            return
        self._seen = found
        try:
            self._entries = read_tokens(self._path)
        except TokenError as error:
            _log.error("tokens_rejected", reason=str(error))
        else:
            _log.info("tokens_reloaded", names=sorted(self._entries))


class TokenFile:
    """A client's token, alone in a file. It is read again after changes; the last readable one counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = ""
        self._seen: FileSignature | None = None
        if not self():
            raise TokenError(f"{path}: holds no token")

    def __call__(self) -> str:
        """Return the token."""
        try:
            if (found := file_signature(self._path)) is None or found != self._seen:
                text = self._path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("ascii")
                self._token = text.strip() or self._token
                self._seen = found
        except (OSError, ValueError) as error:
            if not self._token:
                raise TokenError(f"{self._path}: {type(error).__name__}") from None
        return self._token


def read_tokens(path: Path) -> Mapping[str, TokenEntry]:
    """Read a file's tokens by name. Raises TokenError."""
    try:
        entries = _Entries.validate_python(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        where = (".".join(str(part) for part in problem["loc"] if part != "[key]") for problem in problems)
        raise TokenError(f"{path}: invalid: {', '.join(where)}") from None
    except tomllib.TOMLDecodeError as error:
        raise TokenError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TokenError(f"{path}: {type(error).__name__}") from None
    if not entries:
        raise TokenError(f"{path}: holds no tokens")
    return entries


def hash_token(token: str) -> str:
    """Return the SHA-256 of a token in hex, as in the token file."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_token() -> str:
    """Return a new random token."""
    return f"atspeed_{secrets.token_urlsafe(32)}"
