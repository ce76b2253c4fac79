"""The connection options of commands that call a service.

Address, deadline, certificates and token are declared here once for all commands.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from atspeed.rpc.addresses import target_uri
from atspeed_client import Client, Tls
from atspeed_client.channels import Endpoint

LOCAL = "127.0.0.1:50051"


def _address(value: str) -> str:
    try:
        target_uri(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return value


@dataclass(frozen=True)
class Connection:
    """The options of every command that calls a service."""

    address: Annotated[
        str, typer.Option(help="Address of the service.", envvar="ATSPEED_ADDRESS", callback=_address)
    ] = LOCAL
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.001, max=86_400, help="Deadline of the call in seconds.")
    ] = 10.0
    tls: Annotated[
        bool, typer.Option("--tls", help="Use TLS, for a server with a public certificate.", envvar="ATSPEED_TLS")
    ] = False
    ca: Annotated[
        Path | None,
        typer.Option(
            help="Use TLS with this CA of the server's certificate (PEM).",
            envvar="ATSPEED_CA",
            exists=True,
            dir_okay=False,
        ),
    ] = None
    certificate: Annotated[
        Path | None,
        typer.Option(
            help="Client certificate for mutual TLS (PEM).", envvar="ATSPEED_CERTIFICATE", exists=True, dir_okay=False
        ),
    ] = None
    key: Annotated[
        Path | None,
        typer.Option(help="Key of the client certificate (PEM).", envvar="ATSPEED_KEY", exists=True, dir_okay=False),
    ] = None
    server_name: Annotated[
        str,
        typer.Option(help="Name in the server's certificate, if it is not the address.", envvar="ATSPEED_SERVER_NAME"),
    ] = ""
    token: Annotated[
        str,
        typer.Option(
            help="Bearer token. Prefer the variable, since command lines are visible to all users.",
            envvar="ATSPEED_TOKEN",
            show_envvar=True,
        ),
    ] = ""
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the bearer token. It is read again when it changes.",
            envvar="ATSPEED_TOKEN_FILE",
            exists=True,
            dir_okay=False,
        ),
    ] = None

    def client(self, *, retries: int = 2) -> Client:
        """Create a client of the service. Raises UsageError. retries: how often a call is made again."""
        return Client(self.address, timeout_seconds=self.timeout, retries=retries, tls=self._tls, token=self._token)

    def endpoint(self) -> Endpoint:
        """Return address, certificates and token of the service. Raises UsageError."""
        return Endpoint(self.address, self._tls, self._token)

    @property
    def _token(self) -> str | Callable[[], str] | None:
        if self.token_file is None:
            return self.token or None
        if self.token:
            raise typer.BadParameter("--token and --token-file exclude each other.")
        from atspeed.security.tokens import TokenError, TokenFile

        try:
            return TokenFile(self.token_file)
        except TokenError as error:
            raise typer.BadParameter(f"--token-file: {error}") from None

    @property
    def _tls(self) -> Tls | None:
        encrypted = self.tls or self.ca or self.certificate
        if (self.certificate is None) != (self.key is None):
            raise typer.BadParameter("--certificate and --key go together.")
        if self.server_name and not encrypted:
            raise typer.BadParameter("--server-name needs --tls, --ca or --certificate: this connection is plain text.")
        return Tls(self.ca, self.certificate, self.key, self.server_name) if encrypted else None


def with_connection(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a command's argument `connection` by the options of `Connection`."""
    options = inspect.signature(Connection, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters

    @functools.wraps(command)
    def expanded(**given: Any) -> Any:
        connection = Connection(**{name: given.pop(name) for name in options})
        return command(connection=connection, **given)

    parameters = {name: parameter for name, parameter in own.items() if name != "connection"} | dict(options)
    ordered = sorted(parameters.values(), key=lambda parameter: parameter.default is not parameter.empty)
    expanded.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    hints = get_type_hints(command, include_extras=True) | get_type_hints(Connection, include_extras=True)
    expanded.__annotations__ = {name: hints[name] for name in parameters}
    return expanded
