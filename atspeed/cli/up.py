"""`atspeed up`: the services on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from atspeed.cli.local_services import Services, serve
from atspeed.cli.options import MAX_REPLICAS, BundleFolder, CommandError
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.engine.kv.redis_url import check_redis_url
from atspeed.security.tokens import TokenError, read_tokens


def _redis_url(value: str | None) -> str | None:
    try:
        return check_redis_url(value) if value else value
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


RedisUrl = Annotated[
    str | None,
    typer.Option(
        help="URL of a running Redis; without it one is started. Prefer the variable for a URL with a password, "
        "since command lines are visible to all users.",
        envvar="REDIS_URL",
        callback=_redis_url,
    ),
]
RedisFolder = Annotated[
    Path | None,
    typer.Option(
        help="Data folder of the Redis that is started. Without it, recorded histories are kept in memory only "
        "and lost at the end.",
        file_okay=False,
    ),
]
HttpPort = Annotated[
    int | None,
    typer.Option(
        "--http", min=0, max=65535, help="Also take JSON and gRPC-Web over HTTP on this port, by Envoy; 0 for any."
    ),
]


def _host_names(values: list[str]) -> list[str]:
    for value in values:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:]{2,45}\]", value):
            raise typer.BadParameter("must be a host name or an address, without a port")
    return [value.lower() for value in values]


HttpHosts = Annotated[
    list[str],
    typer.Option(
        "--http-host",
        help="Host name that --http and --console serve besides localhost, 127.0.0.1 and [::1]; repeatable.",
        callback=_host_names,
    ),
]
ConsolePort = Annotated[
    int | None,
    typer.Option(
        "--console", min=0, max=65535, help="As --http, and serve the console, a page that shows searches; 0 for any."
    ),
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics",
        min=0,
        max=65535,
        help="Expose metrics. Prometheus, if it is installed, listens on this port, and the services' exporters on the "
        "ports after it; 0 for any free ports.",
    ),
]


def _tokens_file(value: Path | None) -> Path | None:
    try:
        if value is not None:
            read_tokens(value)
    except TokenError as error:
        raise typer.BadParameter(str(error)) from None
    return value


TokensFile = Annotated[
    Path | None,
    typer.Option(
        help="Bearer tokens of the callers, TOML. Calls then need one.", dir_okay=False, callback=_tokens_file
    ),
]
JwtKeys = Annotated[
    str, typer.Option(help="Key set of an issuer of JSON Web Tokens, a file or a URL. Calls then need a token.")
]
JwtIssuer = Annotated[str, typer.Option(help="The claim `iss` of valid JSON Web Tokens.")]
JwtAudience = Annotated[str, typer.Option(help="The claim `aud` of valid JSON Web Tokens.")]
JwtRate = Annotated[
    float | None,
    typer.Option(min=0.001, max=1e6, help="Quota of each caller with a JSON Web Token, in requests a second."),
]


def up(
    bundle: BundleFolder,
    targets: Annotated[int, typer.Option(min=1, max=MAX_REPLICAS, help="Target replicas.")] = 1,
    drafts: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_REPLICAS, help="Draft replicas; by default 1 if the bundle has a draft."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 lets the system choose.")] = 50051,
    redis_url: RedisUrl = None,
    data: RedisFolder = None,
    log_folder: Annotated[Path | None, typer.Option(help="Folder for the services' logs.", file_okay=False)] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Use TLS, and mutual TLS between the services, with throwaway certificates.")
    ] = False,
    http: HttpPort = None,
    console: ConsolePort = None,
    http_host: HttpHosts = [],  # noqa: B006 - typer copies it
    metrics: MetricsPort = None,
    tokens_file: TokensFile = None,
    jwt_keys: JwtKeys = "",
    jwt_issuer: JwtIssuer = "",
    jwt_audience: JwtAudience = "",
    jwt_requests_per_second: JwtRate = None,
) -> None:
    """Run all services on this machine until Ctrl-C."""
    if redis_url and data:
        raise typer.BadParameter(
            "--data is for the Redis that is started without --redis-url (REDIS_URL); give only one of them"
        )
    if http is not None and console is not None:
        raise typer.BadParameter("--console takes JSON on its port too; give only one of --http and --console")
    http = console if http is None else http
    if http_host and http is None:
        raise typer.BadParameter("--http-host needs --http or --console")
    jwt = {"keys": jwt_keys, "issuer": jwt_issuer, "audience": jwt_audience}
    tokens = _token_settings(tokens_file, {**jwt, "requests-per-second": jwt_requests_per_second})
    serve(
        Services(
            bundle=bundle,
            name=read_manifest(bundle).name,
            targets=targets,
            drafts=_drafts(bundle, drafts),
            port=port,
            redis_url=redis_url,
            data=data,
            log_folder=log_folder,
            tls=tls,
            http=http,
            http_hosts=http_host,
            console=console is not None,
            metrics=metrics,
            tokens=tokens,
        )
    )


def _token_settings(tokens_file: Path | None, jwt: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that were given. Raises typer.BadParameter for a part of those that belong together."""
    given: dict[str, object] = {f"jwt-{name}": value for name, value in jwt.items() if value}
    needed = ("jwt-keys", "jwt-issuer", "jwt-audience")
    if given and not given.keys() >= set(needed):
        raise typer.BadParameter(", ".join(f"--{name}" for name in needed) + " must be given together")
    return given | ({"tokens-file": tokens_file.absolute()} if tokens_file else {})


def _drafts(bundle: Path, asked: int | None) -> int:
    has_draft = read_manifest(bundle).draft is not None
    if asked and not has_draft:
        raise CommandError(f"{bundle}: the bundle has no draft model, use --drafts 0")
    return int(has_draft) if asked is None else asked
