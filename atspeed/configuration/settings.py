"""Declares the settings of a service, each of them once.

Command-line flag, environment variable, --help and docs/settings.md come from the declaration. A service adds its own settings:

    class TargetSettings(ServiceSettings):
        model_config = SettingsConfigDict(env_prefix="ATSPEED_TARGET_")
        service: ClassVar[str] = "target"
        essential: ClassVar[frozenset[str]] = ServiceSettings.essential | {"workers"}

        port: Port = 50052
        workers: int = Field(default=2, ge=1, le=64)
        "Threads per pass."

and reads them with `TargetSettings.load()`. Flags win over environment variables, and those over defaults. An empty variable
counts as not set. An unknown variable with the service's prefix is refused, as it is probably misspelt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    DirectoryPath,
    Field,
    FilePath,
    PlainValidator,
    SecretStr,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from atspeed.artefacts.object_store import check_url
from atspeed.engine.host_names import host_port, is_host, is_loopback
from atspeed.engine.kv.redis_client import RedisTls
from atspeed.engine.kv.redis_url import check_redis_url
from atspeed.observability.logs import LogFormat, LogLevel
from atspeed.security.peers import networks
from atspeed.security.tls import TlsError, TlsFiles, WatchedPems

Port = Annotated[int, Field(ge=0, le=65535, description="Port to listen on. 0: the system chooses one.")]


def _host(text: str) -> str:
    if not is_host(text):
        raise ValueError("is neither an IP address nor a host name")
    return text


Host = Annotated[str, AfterValidator(_host)]


_DIRECTORY: TypeAdapter[Path] = TypeAdapter(DirectoryPath)
_PATH: TypeAdapter[Path | None] = TypeAdapter(Path | None)


def _bundle_place(place: object) -> Path | str:
    """Return the URL or the existing directory that a text names."""
    if isinstance(place, str) and "://" in place:
        return check_url(place)
    return _DIRECTORY.validate_python(place)


def _canary_place(place: object) -> Path | str | None:
    """Return the URL or the path that a text names; the path may not exist yet."""
    if isinstance(place, str) and "://" in place:
        return check_url(place)
    return _PATH.validate_python(place)


BundlePlace = Annotated[Path | str, PlainValidator(_bundle_place, json_schema_input_type=DirectoryPath)]
CanaryPlace = Annotated[Path | str | None, PlainValidator(_canary_place, json_schema_input_type=Path | None)]


def _redis_url(url: SecretStr) -> SecretStr:
    if url.get_secret_value():
        check_redis_url(url.get_secret_value())
    return url


def _networks(text: str) -> str:
    try:
        networks(text)
    except ValueError:
        raise ValueError("must be IP addresses or networks such as 10.0.0.0/8, separated by commas") from None
    return text


class ServiceSettings(BaseSettings):
    """Settings of every service."""

    model_config = SettingsConfigDict(
        frozen=True,
        use_attribute_docstrings=True,
        env_ignore_empty=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_show_env_vars=True,
        cli_exit_on_error=False,
    )
    service: ClassVar[str] = "service"
    essential: ClassVar[frozenset[str]] = frozenset(
        (
            *("bundle", "canary_bundle", "host", "port", "redis_url", "tls_certificate", "tls_key", "tls_client_ca"),
            *("tokens_file", "bundle_public_key", "log_level", "metrics_port", "max_running", "max_queued"),
        )
    )
    """The settings that operators change. --help and docs/settings.md list them before the advanced ones."""

    bundle: BundlePlace
    """Directory of the bundle to serve, a symlink to it, or a URL such as s3://BUCKET/current (see operations.md). A changed
    bundle is loaded and served (hot reload).
    """
    canary_bundle: CanaryPlace = None
    """Directory of the canary bundle, a symlink to it, or a URL. It serves the orchestrator's canary_share of the users. It may
    appear and disappear; without it, `bundle` serves all users.
    """
    bundle_poll_seconds: float = Field(default=1.0, gt=0, le=3600)
    """Interval at which the bundle paths and URLs are checked for changes."""
    bundle_public_key: FilePath | None = None
    """Public keys, PEM, of which one must have signed a bundle (`atspeed bundle sign`). Not set: signatures are not checked."""
    bundle_cache: Path | None = None
    """Folder for bundles that were fetched from a URL. Processes may share it. Not set: atspeed/bundles in the user's cache."""
    host: Host = "127.0.0.1"
    """Address to listen on. 0.0.0.0: all interfaces."""
    port: Port = 0
    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] = SecretStr("")
    """redis://[:PASSWORD@]HOST:PORT/DB with a percent-encoded password, rediss:// for TLS, or unix:///PATH. Empty: no Redis."""
    redis_ca: FilePath | None = None
    """CA of Redis's certificate, PEM; rediss:// only. The default is the system's CAs."""
    redis_certificate: FilePath | None = None
    """Client certificate for Redis, PEM; rediss:// only."""
    redis_key: FilePath | None = None
    """Key of redis_certificate, PEM."""
    tls_certificate: FilePath | None = None
    """The server's certificate chain, PEM. Not set: no TLS."""
    tls_key: FilePath | None = None
    """Key of tls_certificate, PEM."""
    tls_client_ca: FilePath | None = None
    """CA of the certificates that clients must present (mTLS), PEM. Not set: no client certificates."""
    tokens_file: FilePath | None = None
    """Bearer tokens of the callers, TOML (see operations.md). Not set: no authentication by tokens."""
    jwt_keys: str = ""
    """Keys of an issuer of JSON Web Tokens: a JWKS file or its URL. Its tokens are valid beside those of tokens_file. Needs the
    extra `jwt`.
    """
    jwt_issuer: str = ""
    """The claim `iss` of valid JSON Web Tokens."""
    jwt_audience: str = ""
    """The claim `aud` that JSON Web Tokens for this service have."""
    jwt_requests_per_second: float | None = Field(default=None, gt=0, le=1e6)
    """Quota of each caller with a JSON Web Token, in requests a second of one replica. Not set: no limit."""
    insecure: bool = False
    """Allow a host beyond loopback without tokens and tls_client_ca. Everyone with network access may then call."""
    log_level: LogLevel = "info"
    """Lowest level that is logged."""
    log_format: LogFormat = "json"
    """json: one object per line. console: text for people."""
    trusted_proxies: Annotated[str, AfterValidator(_networks)] = ""
    """Addresses of proxies such as Envoy: IP,NETWORK/BITS. Logs of failed calls then name the address that these forward in
    x-forwarded-for. Empty: the header is ignored.
    """
    log_error_texts: bool = False
    """Log the texts of unexpected errors too. They may quote users' histories, so this is for debugging."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """HTTP port of the Prometheus exporter. 0: the system chooses one. Not set: no exporter."""
    metrics_host: Host = "127.0.0.1"
    """Address of the Prometheus exporter."""
    tracing: bool = False
    """Send OpenTelemetry spans over OTLP/gRPC. The OTEL_* variables name the collector, by default http://localhost:4317. Needs
    the extra `otel`.
    """
    drain_seconds: float = Field(default=20.0, ge=0, le=600)
    """Time that running calls get to end after SIGTERM or SIGINT (graceful drain)."""
    max_message_bytes: int = Field(default=33_554_432, ge=65_536, le=1_073_741_824)
    """Maximum size of a message, received or sent."""
    max_running: int = Field(default=256, ge=1, le=100_000)
    """Maximum number of recommendations (also of batches), plans or target streams that run at once."""
    max_queued: int = Field(default=64, ge=0, le=100_000)
    """Maximum number of calls that wait for one of max_running. Further ones get RESOURCE_EXHAUSTED at once."""
    max_concurrent_calls: int = Field(default=1024, ge=1, le=100_000)
    """Maximum number of open calls of one method, with those whose message has not arrived yet. Health has no limit."""
    max_connection_seconds: float = Field(default=300.0, ge=1, le=86_400)
    """Maximum age of a connection. Clients then reconnect and find new replicas."""
    max_streams: int = Field(default=1024, ge=1, le=1_000_000)
    """Maximum number of open calls on one connection. Further ones wait in the client."""
    max_metadata_bytes: int = Field(default=16_384, ge=4_096, le=1_048_576)
    """Maximum size of a call's metadata, as HTTP/2 counts it."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """Refuse half a security setting, which looks like a complete one."""
        self._go_together("tls_certificate", "tls_key")
        self._go_together("redis_certificate", "redis_key")
        self._needs("tls_client_ca", "tls_certificate", bool(self.tls_certificate))
        for name in ("redis_ca", "redis_certificate"):
            self._needs(name, "redis_url", self.redis_url.get_secret_value().startswith("rediss://"), "rediss://...")
        self._go_together("jwt_keys", "jwt_issuer", "jwt_audience")
        self._needs("jwt_requests_per_second", "jwt_keys", bool(self.jwt_keys))
        if not (self.loopback or self.tokens_file or self.jwt_keys or self.tls_client_ca or self.insecure):
            names = ("tokens_file", "jwt_keys", "tls_client_ca", "insecure")
            ways = ", ".join(spelling(type(self), name) for name in names)
            raise ValueError(f"{spelling(type(self), 'host')}: beyond loopback one of these must be set: {ways}")
        return self

    def _go_together(self, *names: str) -> None:
        if len({getattr(self, name) in {None, ""} for name in names}) > 1:
            raise ValueError(" and ".join(spelling(type(self), name) for name in names) + " must be set together")

    def _needs(self, name: str, other: str, there: bool, value: str = "") -> None:
        if getattr(self, name) and not there:
            raise ValueError(
                " ".join([spelling(type(self), name), "needs", spelling(type(self), other), value]).strip()
            )

    @property
    def loopback(self) -> bool:
        """Return whether the server listens on loopback only."""
        return is_loopback(self.host)

    @property
    def server_tls(self) -> TlsFiles | None:
        """Return the files of the server's TLS; None without TLS."""
        if self.tls_certificate is None:
            return None
        return TlsFiles(self.tls_certificate, self.tls_key, self.tls_client_ca)

    @property
    def redis_tls(self) -> RedisTls:
        """Return the TLS of a rediss:// URL. Raises TlsError for files that cannot be used."""
        try:
            WatchedPems(TlsFiles(self.redis_certificate, self.redis_key, self.redis_ca))
        except TlsError as error:
            names = ", ".join(spelling(type(self), name) for name in ("redis_ca", "redis_certificate"))
            raise TlsError(f"{names}: {error}") from None
        return RedisTls(ca=self.redis_ca, certificate=self.redis_certificate, key=self.redis_key)

    @classmethod
    def load(cls, arguments: Sequence[str] | None = None) -> Self:
        """Read flags (by default this process's) and environment. A bad value prints one line and exits with code 2."""
        flags = list(sys.argv[1:] if arguments is None else arguments)
        build: Callable[..., Self] = cls
        try:
            _refuse_unknown_variables(cls)
            return build(_cli_settings_source=_cli_source(cls)(args=flags))
        except ValidationError as error:
            problem = "; ".join(_problems(cls, error))
        except SettingsError as error:
            problem = " ".join(str(error).split())
        sys.stderr.write(f"{cls.service}: {problem}\n")
        raise SystemExit(2)

    @property
    def address(self) -> str:
        """Return `host:port` as gRPC spells it."""
        return host_port(self.host, self.port)


def flag(field: str) -> str:
    """Return the command-line flag of a setting."""
    return f"--{field.replace('_', '-')}"


def variable(settings: type[ServiceSettings], field: str) -> str:
    """Return the environment variable of a setting."""
    return f"{settings.model_config['env_prefix']}{field}".upper()


def spelling(settings: type[ServiceSettings], field: str) -> str:
    """Return both names of a setting, for messages."""
    return f"{flag(field)} ({variable(settings, field)})"


def _cli_source(settings: type[ServiceSettings]) -> CliSettingsSource[ServiceSettings]:
    """Return the parser of the flags. Its --help lists the essential settings first, and then the advanced ones."""
    groups: dict[bool, Any] = {}

    def add_argument(parser: Any, *names: str, **options: Any) -> Any:
        if not groups:
            groups[True] = parser.add_argument_group("essential settings")
            groups[False] = parser.add_argument_group("advanced settings")
        field = names[-1].removeprefix("--").replace("-", "_")
        group = groups[field in settings.essential] if field in settings.model_fields else parser
        return group.add_argument(*names, **options)

    return CliSettingsSource(settings, cli_prog_name=settings.service, add_argument_method=add_argument)


def _refuse_unknown_variables(settings: type[ServiceSettings]) -> None:
    prefix = settings.model_config["env_prefix"].upper()
    known = {variable(settings, field) for field in settings.model_fields}
    unknown = sorted(
        name for name in os.environ if prefix and name.upper().startswith(prefix) and name.upper() not in known
    )
    if unknown:
        raise SettingsError(f"no such setting: {', '.join(unknown)}")


def _problems(settings: type[ServiceSettings], error: ValidationError) -> Iterator[str]:
    """Yield one line per bad value, without the value, which may be secret."""
    for entry in error.errors(include_url=False, include_input=False):
        names = [str(part) for part in entry["loc"]]
        where = f"{spelling(settings, names[0])}: " if names else ""
        yield where + entry["msg"].removeprefix("Value error, ")
