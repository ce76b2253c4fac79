"""Checks bearer tokens that an issuer signs: JSON Web Tokens (RFC 7519).

OpenID Connect providers give such tokens to their clients. The issuer's public keys are a JSON Web Key Set (RFC 7517), in a file
or at an https URL; http is for an issuer on this machine. Needs the extra `jwt`.

    claim      meaning
    iss, aud   must be the settings `jwt_issuer` and `jwt_audience`
    exp        end of validity; must be there
    sub        name of the caller in logs and quotas; must be there, with 1 to 256 characters
    scope      scopes, separated by spaces (RFC 8693); a list `scp` counts too. Other words are ignored
    tenants    list of the tenants that calls may name; without it, all
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import jwt
import structlog

from atspeed.engine.host_names import is_loopback
from atspeed.errors import UnavailableError
from atspeed.security.callers import Caller, Grant
from atspeed.security.file_watch import file_signature
from atspeed.security.quotas import Quota
from atspeed.security.scopes import Scope

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Signatures with a private key only: with a shared secret, everyone who can check tokens could make them.
ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
# Chosen: the clocks of two machines in one network differ by less.
_LEEWAY_SECONDS: Final = 10
# Keys change rarely, and issuers announce new ones hours before they sign with them. An unknown key id asks again at once, but
# not more often than this, so that a flood of invented ids does not become one of requests to the issuer.
_KEEP_SECONDS: Final = 300.0
_OUTDATED_SECONDS: Final = 2 * _KEEP_SECONDS
_ASK_AGAIN_SECONDS: Final = 10.0
_TIMEOUT_SECONDS: Final = 5.0
_MAX_KEY_SET_BYTES: Final = 1_048_576
_MAX_NAME: Final = 256


class KeySetError(ValueError):
    """A key set that cannot be read or used. The text names the file or the URL."""


@dataclass(frozen=True)
class Issuer:
    """The claims that a valid token must have.

    Attributes:
        name: claim `iss`.
        audience: one of the claims `aud`.
        quota: requests that each caller may make; None for no limit.
    """

    name: str
    audience: str
    quota: Quota | None = None


class KeySet:
    """The public keys of an issuer by key id, read again when they may have changed. source: a path or an https URL.

    Raises KeySetError for an http URL of another machine: who can change its answers could sign tokens.
    """

    def __init__(self, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        parts = urlsplit(source)
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise KeySetError(f"{source}: must be https, or on this machine")
        self._source = source
        self._clock = clock
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._seen: object = None
        self._asked = -float("inf")
        self._reading: asyncio.Task[None] | None = None  # the latest reading of a URL in the background
        self._outdated = False  # whether nobody had asked for long before that

    async def load(self) -> None:
        """Read the keys for the first time. Raises KeySetError for a file that is none.

        An issuer that does not answer is logged only, since it may answer later.
        """
        try:
            await self._read()
        except KeySetError as error:
            if not is_url(self._source):
                raise
            _log.error("jwt_keys_unreadable", reason=str(error))

    async def key(self, key_id: str) -> jwt.PyJWK | None:
        """Return a key; None if the issuer has none of that id. Raises UnavailableError without any keys.

        Keys of a URL are read again in the background. Only a call with an unknown id waits for that, for a limited time, and any
        call after a long time without calls: a key may have been withdrawn meanwhile.
        """
        if not is_url(self._source):
            if file_signature(Path(self._source)) != self._seen:
                await self._refresh()
        elif self._stale(key_id):
            self._outdated = self._clock() - self._asked >= _OUTDATED_SECONDS
            # Its log lines are about the issuer, and not about the caller whose token made it necessary.
            self._reading = asyncio.create_task(self._refresh(), context=Context())
        if self._reading is not None and (self._outdated or key_id not in self._keys):
            await asyncio.wait([self._reading], timeout=_TIMEOUT_SECONDS)
        if not self._keys:
            raise UnavailableError("the keys of the tokens' issuer cannot be read now")
        return self._keys.get(key_id)

    def _stale(self, key_id: str) -> bool:
        if self._reading is not None and not self._reading.done():
            return False
        keep = _KEEP_SECONDS if key_id in self._keys else _ASK_AGAIN_SECONDS
        return self._clock() - self._asked >= keep

    async def _refresh(self) -> None:
        """Read the keys again. The earlier ones stay where that fails."""
        try:
            await self._read()
        except KeySetError as error:
            _log.error("jwt_keys_unreadable", reason=str(error))
        else:
            _log.info("jwt_keys_read", keys=len(self._keys))

    async def _read(self) -> None:
        self._asked = self._clock()
        if is_url(self._source):
            text = await asyncio.to_thread(_fetched, self._source)
        else:
            self._seen = file_signature(Path(self._source))
            text = _read_file(Path(self._source))
        self._keys = _parsed(self._source, text)


class JsonWebTokens:
    """Authenticates callers by tokens of one issuer."""

    def __init__(self, issuer: Issuer, keys: KeySet) -> None:
        self._issuer = issuer
        self._keys = keys

    async def authenticate(self, token: str) -> Caller | None:
        """Return the caller of a token; None if it is no token of the issuer, has expired, or is for others.

        Raises UnavailableError while the issuer's keys cannot be read.
        """
        try:
            key_id = jwt.get_unverified_header(token).get("kid", "")
        except jwt.InvalidTokenError:
            return None
        if not isinstance(key_id, str) or (key := await self._keys.key(key_id)) is None:
            return None
        try:
            # The key's own algorithm, never the one that the token names (RFC 8725, section 3.1).
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm_name],
                issuer=self._issuer.name,
                audience=self._issuer.audience,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.InvalidTokenError as error:
            _log.debug("jwt_refused", reason=type(error).__name__)
            return None
        return self._caller(claims)

    def _caller(self, claims: Mapping[str, Any]) -> Caller | None:
        """Return the caller that the claims name; None for claims of another form."""
        name, tenants = claims["sub"], claims.get("tenants")
        if (
            not isinstance(name, str)
            or not 1 <= len(name) <= _MAX_NAME
            or not (tenants is None or _is_list_of_texts(tenants))
        ):
            return None
        grant = Grant(_scopes(claims), None if tenants is None else frozenset(tenants), self._issuer.quota)
        # The label in metrics is the same for all, since an issuer may know any number of callers.
        return Caller(name, "jwt", grant)


def is_url(source: str) -> bool:
    """Return whether the source of a key set is a URL."""
    return urlsplit(source).scheme in {"https", "http"}


def _scopes(claims: Mapping[str, Any]) -> frozenset[Scope]:
    text, listed = claims.get("scope", ""), claims.get("scp", [])
    words = set(text.split()) if isinstance(text, str) else set()
    words |= set(listed) if _is_list_of_texts(listed) else set()
    return frozenset(scope for scope in Scope if scope.value in words)


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise KeySetError(f"{path}: {type(error).__name__}") from None


class _SameScheme(HTTPRedirectHandler):
    """Follows redirects that stay with https, or with http."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        """Return the next request; None, which is an error, when it has another scheme."""
        if urlsplit(newurl).scheme != req.type:
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetched(url: str) -> str:
    request = Request(url, headers={"Accept": "application/json"})  # noqa: S310 - the setting allows http and https only
    try:
        with build_opener(_SameScheme).open(request, timeout=_TIMEOUT_SECONDS) as answer:
            content = _body(answer)
    except (OSError, HTTPException, ValueError) as error:
        raise KeySetError(f"{url}: {type(error).__name__}") from None
    if len(content) > _MAX_KEY_SET_BYTES:
        raise KeySetError(f"{url}: larger than {_MAX_KEY_SET_BYTES} bytes")
    return content.decode("utf-8", "replace")


def _body(answer: HTTPResponse) -> bytes:
    """Read an answer up to the limit. Raises TimeoutError when it is not there in time, however steadily it comes."""
    until, content = time.monotonic() + _TIMEOUT_SECONDS, b""
    while len(content) <= _MAX_KEY_SET_BYTES and (part := answer.read1(_MAX_KEY_SET_BYTES + 1)):
        if time.monotonic() > until:
            raise TimeoutError
        content += part
    return content


def _parsed(source: str, text: str) -> Mapping[str, jwt.PyJWK]:
    """Return the signing keys by key id. Raises KeySetError for a text that is no key set, or has no usable key."""
    try:
        listed = jwt.PyJWKSet.from_json(text).keys
    except (jwt.PyJWTError, ValueError, AttributeError, RecursionError):
        raise KeySetError(f"{source}: is no JSON Web Key Set with a usable key") from None
    keys = {
        key.key_id or "": key
        for key in listed
        if key.public_key_use in {None, "sig"} and key.algorithm_name in ALGORITHMS
    }
    if not keys:
        raise KeySetError(f"{source}: has no key for signatures of {', '.join(ALGORITHMS)}")
    return keys
