"""Reads bearer tokens from a TOML file, and again when the file changes.

    [shop]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    scopes = ["read", "write"]
    tenants = ["acme"]                   # the only tenants that calls may name; default: all
    expires = 2027-01-31T00:00:00Z       # default: never

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
from typing import Annotated, Final

import structlog
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from atspeed.security.file_watch import FileSignature, file_signature
from atspeed.security.scopes import Scope

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class TokenError(ValueError):
    """A token file that cannot be used. The text names the file and the mistake, and quotes no value."""


class Grant(BaseModel):
    """The permissions of a token.

    Attributes:
        sha256: hash of the token, in hex.
        scopes: scopes of the token.
        tenants: tenants that calls may name; None for all.
        expires: end of the token's validity; None for never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", repr=False)]
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    tenants: frozenset[str] | None = None
    expires: AwareDatetime | None = None

    def expired(self, now: datetime) -> bool:
        """Return whether the token has expired."""
        return self.expires is not None and self.expires <= now


TOKEN_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_Grants = TypeAdapter(dict[Annotated[str, Field(pattern=f"^{TOKEN_NAME.pattern}$")], Grant])


class Tokens:
    """The tokens of a file, which is checked for changes before each use. Raises TokenError for a bad file at first.

    A bad file later is logged and ignored, and the earlier tokens stay valid.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = file_signature(path)
        self._grants = read_tokens(path)

    def authenticate(self, token: str) -> tuple[str, Grant] | None:
        """Return the name and the grant of a token; None if it is unknown or expired.

        Every hash is compared, each in constant time, so the duration reveals nothing about the tokens.
        """
        self._refresh()
        digest, found = hash_token(token), None
        for name, grant in self._grants.items():
            if hmac.compare_digest(digest, grant.sha256) and not grant.expired(datetime.now(UTC)):
                found = name, grant
        return found

    def _refresh(self) -> None:
        if (found := file_signature(self._path)) == self._seen:
            return
        self._seen = found
        try:
            self._grants = read_tokens(self._path)
        except TokenError as error:
            _log.error("tokens_rejected", reason=str(error))
        else:
            _log.info("tokens_reloaded", names=sorted(self._grants))


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


def read_tokens(path: Path) -> Mapping[str, Grant]:
    """Read a file's tokens by name. Raises TokenError."""
    try:
        grants = _Grants.validate_python(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        where = (".".join(str(part) for part in problem["loc"] if part != "[key]") for problem in problems)
        raise TokenError(f"{path}: invalid: {', '.join(where)}") from None
    except tomllib.TOMLDecodeError as error:
        raise TokenError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TokenError(f"{path}: {type(error).__name__}") from None
    if not grants:
        raise TokenError(f"{path}: holds no tokens")
    return grants


def hash_token(token: str) -> str:
    """Return the SHA-256 of a token in hex, as in the token file."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_token() -> str:
    """Return a new random token."""
    return f"atspeed_{secrets.token_urlsafe(32)}"
