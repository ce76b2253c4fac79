"""One declaration per setting: command-line flag, environment variable, --help and docs/settings.md all come from it.

A service declares its own beside the common ones:

    class TargetSettings(ServiceSettings):
        model_config = SettingsConfigDict(env_prefix="ATSPEED_TARGET_")
        service: ClassVar[str] = "target"

        port: Port = 50052
        workers: int = Field(default=2, ge=1, le=64)
        "Threads per pass."

and reads it with `TargetSettings.load()`. Flags win over environment variables, and those over defaults. An empty
variable counts as not set; one with the service's prefix that no setting claims is refused: it is most likely misspelt.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, DirectoryPath, Field, FilePath, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from atspeed.engine.kv.redis_client import RedisTls
from atspeed.engine.kv.redis_url import check_redis_url
from atspeed.observability.logs import LogFormat, LogLevel
from atspeed.security.tls import TlsError, TlsFiles, WatchedPems

Port = Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 lets the system choose one.")]


def _redis_url(url: SecretStr) -> SecretStr:
    if url.get_secret_value():
        check_redis_url(url.get_secret_value())
    return url


class ServiceSettings(BaseSettings):
    """The settings that every service has."""

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

    bundle: DirectoryPath
    """Directory of the bundle to serve, or a symlink to it; another one is taken up as it changes."""
    canary_bundle: Path | None = None
    """Another bundle, or a symlink to it, to serve beside it: to the orchestrator's canary_share of the users. It may come and
    go; while there is none, all are served by `bundle`.
    """
    bundle_poll_seconds: float = Field(default=1.0, gt=0, le=3600)
    """How often the service looks whether these are other bundles."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on. 0.0.0.0 is every interface."""
    port: Port = 0
    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] = SecretStr("")
    """redis://[:PASSWORD@]HOST:PORT/DB, password percent-encoded; rediss:// over TLS, unix:///PATH. Empty: work without Redis."""
    redis_ca: FilePath | None = None
    """CA of Redis's certificate, PEM; rediss:// only. The system's CAs without it."""
    redis_certificate: FilePath | None = None
    """Certificate that Redis is shown, PEM; rediss:// only."""
    redis_key: FilePath | None = None
    """Its key."""
    tls_certificate: FilePath | None = None
    """This server's certificate chain, PEM. Not set: plain text."""
    tls_key: FilePath | None = None
    """Its key."""
    tls_client_ca: FilePath | None = None
    """CA, PEM, of which callers must show a certificate (mTLS). Not set: they need none."""
    tokens_file: FilePath | None = None
    """Bearer tokens that may call, TOML, see operations.md. Not set: calls need no token."""
    insecure: bool = False
    """Listen beyond loopback with neither tokens_file nor tls_client_ca: whoever gets there may call."""
    log_level: LogLevel = "info"
    """The least severe level that is logged."""
    log_format: LogFormat = "json"
    """json: one object a line. console: for people."""
    log_error_texts: bool = False
    """Log what unexpected errors say, beside where they arose. It may quote users' histories: to debug."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port for Prometheus, HTTP; 0 lets the system choose one. Not set: none."""
    metrics_host: str = Field(default="127.0.0.1", min_length=1)
    """Address that Prometheus finds that port on."""
    tracing: bool = False
    """Send OpenTelemetry spans over OTLP/gRPC to where the OTEL_* variables say, by default http://localhost:4317. Needs the
    extra `otel`.
    """
    drain_seconds: float = Field(default=20.0, ge=0, le=600)
    """How long calls that run at SIGTERM or SIGINT may take to end."""
    max_message_bytes: int = Field(default=33_554_432, ge=65_536, le=1_073_741_824)
    """Largest message, received or sent."""
    max_running: int = Field(default=256, ge=1, le=100_000)
    """Recommendations (also of batches), plans or target streams served at once."""
    max_queued: int = Field(default=64, ge=0, le=100_000)
    """Those that wait for that; more get RESOURCE_EXHAUSTED at once."""
    max_concurrent_calls: int = Field(default=1024, ge=1, le=100_000)
    """Calls of one method at once, also those whose message is still on its way; health apart."""
    max_connection_seconds: float = Field(default=300.0, ge=1, le=86_400)
    """Age at which a connection is renewed, so that clients find new replicas."""
    max_streams: int = Field(default=1024, ge=1, le=1_000_000)
    """Calls under way on one connection; a client's further ones wait there."""
    max_metadata_bytes: int = Field(default=16_384, ge=4_096, le=1_048_576)
    """Largest metadata of a call, as HTTP/2 counts it."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """Half a security setting is refused: it would be taken for a whole one."""
        self._go_together("tls_certificate", "tls_key")
        self._go_together("redis_certificate", "redis_key")
        self._needs("tls_client_ca", "tls_certificate", bool(self.tls_certificate))
        for name in ("redis_ca", "redis_certificate"):
            self._needs(name, "redis_url", self.redis_url.get_secret_value().startswith("rediss://"), "rediss://...")
        if not (self.loopback or self.tokens_file or self.tls_client_ca or self.insecure):
            ways = ", ".join(spelling(type(self), name) for name in ("tokens_file", "tls_client_ca", "insecure"))
            raise ValueError(f"{spelling(type(self), 'host')}: beyond loopback one of these must be set: {ways}")
        return self

    def _go_together(self, *names: str) -> None:
        if len({getattr(self, name) is None for name in names}) > 1:
            raise ValueError(" and ".join(spelling(type(self), name) for name in names) + " go together")

    def _needs(self, name: str, other: str, there: bool, value: str = "") -> None:
        if getattr(self, name) and not there:
            raise ValueError(
                " ".join([spelling(type(self), name), "needs", spelling(type(self), other), value]).strip()
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def server_tls(self) -> TlsFiles | None:
        """What the server speaks TLS with; None for plain text."""
        if self.tls_certificate is None:
            return None
        return TlsFiles(self.tls_certificate, self.tls_key, self.tls_client_ca)

    @property
    def redis_tls(self) -> RedisTls:
        """What Redis is spoken to with, where its URL is rediss://. Raises TlsError for files that are of no use for that."""
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
            return build(_cli_parse_args=flags, _cli_prog_name=cls.service)
        except ValidationError as error:
            problem = "; ".join(_problems(cls, error))
        except SettingsError as error:
            problem = " ".join(str(error).split())
        sys.stderr.write(f"{cls.service}: {problem}\n")
        raise SystemExit(2)

    @property
    def address(self) -> str:
        """`host:port` as gRPC spells it."""
        return address(self.host, self.port)


def address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def flag(field: str) -> str:
    """The command-line flag of a setting."""
    return f"--{field.replace('_', '-')}"


def variable(settings: type[ServiceSettings], field: str) -> str:
    """The environment variable of a setting."""
    return f"{settings.model_config['env_prefix']}{field}".upper()


def spelling(settings: type[ServiceSettings], field: str) -> str:
    """Both names of a setting, for messages."""
    return f"{flag(field)} ({variable(settings, field)})"


def _refuse_unknown_variables(settings: type[ServiceSettings]) -> None:
    prefix = settings.model_config["env_prefix"].upper()
    known = {variable(settings, field) for field in settings.model_fields}
    unknown = sorted(
        name for name in os.environ if prefix and name.upper().startswith(prefix) and name.upper() not in known
    )
    if unknown:
        raise SettingsError(f"no such setting: {', '.join(unknown)}")


def _problems(settings: type[ServiceSettings], error: ValidationError) -> Iterator[str]:
    """One line per bad value. Values themselves are left out: they may be secret."""
    for entry in error.errors(include_url=False, include_input=False):
        names = [str(part) for part in entry["loc"]]
        where = f"{spelling(settings, names[0])}: " if names else ""
        yield where + entry["msg"].removeprefix("Value error, ")
