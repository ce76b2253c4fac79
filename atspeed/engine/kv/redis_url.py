"""The URL of a Redis, checked when it is read.

    redis://[[USERNAME]:[PASSWORD]@]HOST[:PORT][/DB]      rediss:// likewise, over TLS
    unix://[[USERNAME]:[PASSWORD]@]/PATH

DB may be an option as well, ?db=DB, and so may the version of Redis's protocol, ?protocol=2. redis-py itself leaves out what it
does not understand, or refuses it at the first call, and takes options that change how often a call is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import SplitResult, parse_qsl, unquote_to_bytes, urlsplit

from atspeed.engine.host_names import is_host

_SCHEMES = ("redis://", "rediss://", "unix://")
_ENCODE = "percent-encode user name and password: # is %23, / is %2F, ? is %3F, @ is %40"
_MOST_DATABASES = 2**31
_LONGEST_SOCKET_PATH = 107  # sun_path, sockaddr_un(7)


def check_redis_url(url: str) -> str:
    """The URL itself, if it names a Redis. ValueError says what is wrong and quotes nothing of it: it may hold a password."""
    if not url.startswith(_SCHEMES):
        raise ValueError("must start with redis://, rediss:// or unix://")
    if any(not character.isprintable() or character.isspace() for character in url):
        raise ValueError(f"must hold no spaces, line ends or control characters; {_ENCODE}")
    if "#" in url:
        raise ValueError(f"must hold no #; {_ENCODE}")
    parts = _split(url)
    _check_user(parts)
    options = _options(parts.query)
    if parts.scheme == "unix":
        _check_socket(parts)
        _check_database([value for name, value in options if name == "db"])
        return url
    _check_host(parts)
    _check_port(parts)
    path = parts.path.strip("/")
    _check_database([value for name, value in options if name == "db"] + [path] * bool(path))
    return url


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise ValueError(f"must hold [ and ] only around an IPv6 address; {_ENCODE}") from None


def _check_user(parts: SplitResult) -> None:
    """redis-py decodes both, and replaces what is not UTF-8."""
    try:
        for part in (parts.username, parts.password):
            unquote_to_bytes(part or "").decode()
    except UnicodeDecodeError:
        raise ValueError("user name and password must be UTF-8, percent-encoded") from None


def _options(query: str) -> list[tuple[str, str]]:
    """Names and values. The names are not quoted either: a ? in a password makes options of its rest."""
    options = parse_qsl(query, keep_blank_values=True)
    names = [name for name, _ in options]
    if set(names) - {"db", "protocol"} or len(set(names)) < len(names) or (query and not options):
        raise ValueError(f"may have the options db and protocol, each once, and no other; {_ENCODE}")
    if dict(options).get("protocol", "3") not in ("2", "3"):
        raise ValueError("the option protocol must be 2 or 3")
    return options


def _check_socket(parts: SplitResult) -> None:
    path = unquote_to_bytes(parts.path)
    if parts.netloc.rpartition("@")[2] or path in (b"", b"/"):
        raise ValueError("must name a socket by its absolute path: unix:///PATH")
    if len(path) > _LONGEST_SOCKET_PATH or b"\0" in path:
        raise ValueError(f"the path of a socket has at most {_LONGEST_SOCKET_PATH} bytes, none of them zero")


def _check_host(parts: SplitResult) -> None:
    if not parts.hostname:
        raise ValueError(f"must name a host: redis://HOST:PORT/DB; {_ENCODE}")
    if not is_host(parts.hostname):
        raise ValueError(f"the host is neither a name nor an IP address (IPv6 in brackets); {_ENCODE}")


def _check_port(parts: SplitResult) -> None:
    try:
        usable = parts.port != 0 and not parts.netloc.endswith(":")
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"the port must be a number from 1 to 65535; {_ENCODE}")


def _check_database(given: Sequence[str]) -> None:
    if len(given) > 1:
        raise ValueError("names the database twice: /DB and ?db=DB")
    if not all(text.isascii() and text.isdecimal() and int(text) < _MOST_DATABASES for text in given):
        raise ValueError(f"the database must be a number from 0 up, as in /0; {_ENCODE}")
