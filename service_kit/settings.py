"""One declaration per setting: command-line flag, environment variable, --help and docs/settings.md all come from it.

A service declares its own beside the common ones:

    class TargetSettings(ServiceSettings):
        model_config = SettingsConfigDict(env_prefix="ATSPEED_TARGET_")
        service: ClassVar[str] = "target"

        port: Port = 50052
        workers: Annotated[int, Field(ge=1, le=64, description="Threads per pass.")] = 2

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

from engine.redis_client import RedisTls
from service_kit.logs import LogFormat, LogLevel
from service_kit.tls import TlsFiles

Port = Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 lets the system choose one.")]


def _redis_url(url: SecretStr) -> SecretStr:
    if url.get_secret_value() and not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must start with redis://, rediss:// or unix://")
    return url


class ServiceSettings(BaseSettings):
    """The settings that every service has."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_ignore_empty=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_show_env_vars=True,
        cli_exit_on_error=False,
    )
    service: ClassVar[str] = "service"

    bundle: Annotated[
        DirectoryPath,
        Field(
            description="Directory of the bundle to serve, or a symlink to it; another one is taken up as it changes."
        ),
    ]
    canary_bundle: Annotated[
        Path | None,
        Field(
            description="Another bundle, or a symlink to it, to serve beside it: to the orchestrator's canary_share of the users."
            " It may come and go; while there is none, all are served by `bundle`."
        ),
    ] = None
    bundle_poll_seconds: Annotated[
        float, Field(gt=0, le=3600, description="How often the service looks whether these are other bundles.")
    ] = 1.0
    host: Annotated[str, Field(min_length=1, description="Address to listen on. 0.0.0.0 is every interface.")] = (
        "127.0.0.1"
    )
    port: Port = 0
    redis_url: Annotated[
        SecretStr,
        AfterValidator(_redis_url),
        Field(description="redis://[:PASSWORD@]HOST:PORT/DB, password percent-encoded. Empty: work without Redis."),
    ] = SecretStr("")
    redis_ca: Annotated[
        FilePath | None,
        Field(description="CA of Redis's certificate, PEM; rediss:// only. The system's CAs without it."),
    ] = None
    redis_certificate: Annotated[
        FilePath | None, Field(description="Certificate that Redis is shown, PEM; rediss:// only.")
    ] = None
    redis_key: Annotated[FilePath | None, Field(description="Its key.")] = None
    tls_certificate: Annotated[
        FilePath | None, Field(description="This server's certificate chain, PEM. Not set: plain text.")
    ] = None
    tls_key: Annotated[FilePath | None, Field(description="Its key.")] = None
    tls_client_ca: Annotated[
        FilePath | None,
        Field(description="CA, PEM, of which callers must show a certificate (mTLS). Not set: they need none."),
    ] = None
    tokens_file: Annotated[
        FilePath | None,
        Field(description="Bearer tokens that may call, TOML, see operations.md. Not set: calls need no token."),
    ] = None
    insecure: Annotated[
        bool,
        Field(
            description="Listen beyond loopback with neither tokens_file nor tls_client_ca: whoever gets there may call."
        ),
    ] = False
    log_level: Annotated[LogLevel, Field(description="The least severe level that is logged.")] = "info"
    log_format: Annotated[LogFormat, Field(description="json: one object a line. console: for people.")] = "json"
    log_error_texts: Annotated[
        bool,
        Field(
            description="Log what unexpected errors say, beside where they arose. It may quote users' histories: to debug."
        ),
    ] = False
    metrics_port: Annotated[
        int | None,
        Field(ge=0, le=65535, description="Port for Prometheus, HTTP; 0 lets the system choose one. Not set: none."),
    ] = None
    metrics_host: Annotated[str, Field(min_length=1, description="Address that Prometheus finds that port on.")] = (
        "127.0.0.1"
    )
    tracing: Annotated[
        bool,
        Field(
            description="Send OpenTelemetry spans over OTLP/gRPC to where the OTEL_* variables say, by default "
            "http://localhost:4317. Needs the extra `otel`."
        ),
    ] = False
    drain_seconds: Annotated[
        float, Field(ge=0, le=600, description="How long calls that run at SIGTERM or SIGINT may take to end.")
    ] = 20.0
    max_message_bytes: Annotated[
        int, Field(ge=65_536, le=1_073_741_824, description="Largest message, received or sent.")
    ] = 33_554_432
    max_running: Annotated[
        int,
        Field(
            ge=1, le=100_000, description="Recommendations (also of batches), plans or target streams served at once."
        ),
    ] = 256
    max_queued: Annotated[
        int, Field(ge=0, le=100_000, description="Those that wait for that; more get RESOURCE_EXHAUSTED at once.")
    ] = 64
    max_concurrent_calls: Annotated[
        int,
        Field(
            ge=1,
            le=100_000,
            description="Calls of one method at once, also those whose message is still on its way; health apart.",
        ),
    ] = 1024
    max_connection_seconds: Annotated[
        float,
        Field(ge=1, le=86_400, description="Age at which a connection is renewed, so that clients find new replicas."),
    ] = 300.0
    max_streams: Annotated[
        int,
        Field(ge=1, le=1_000_000, description="Calls under way on one connection; a client's further ones wait there."),
    ] = 1024
    max_metadata_bytes: Annotated[
        int, Field(ge=4_096, le=1_048_576, description="Largest metadata of a call, as HTTP/2 counts it.")
    ] = 16_384

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
        """What Redis is spoken to with, where its URL is rediss://."""
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
