"""`atspeed certificates` and `atspeed token`: credentials for secured services."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from atspeed.cli.options import AsJson, CommandError, err, optional, print_result
from atspeed.security.scopes import Scope
from atspeed.security.tokens import TOKEN_NAME, hash_token, new_token


def certificates(
    folder: Annotated[Path, typer.Argument(help="Folder to write them to.", file_okay=False)], as_json: AsJson = False
) -> None:
    """Write throwaway certificates of a throwaway CA, one folder per service, to try TLS. Not for production."""
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{folder}: is not empty; certificates of another CA would not fit its files")
    made = optional("atspeed.local.certificates").LocalCertificates(folder)
    paths = sorted(path for path in made.folder.rglob("*") if path.is_file())
    print_result("\n".join(map(str, paths)), {"files": [str(path) for path in paths]}, as_json=as_json)


def token(
    name: Annotated[str, typer.Argument(help="Name of the caller: letters, digits, `.`, `_`, `-`.")],
    scope: Annotated[list[Scope], typer.Option(help="Permission of the token; repeat for several.")],
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            help="Tenant that the token may name; repeat for several. Without it, any. '' is the unnamed tenant."
        ),
    ] = None,
    requests_per_second: Annotated[
        float | None, typer.Option(min=0.001, max=1e6, help="Quota of the caller; by default no limit.")
    ] = None,
    burst: Annotated[
        float | None,
        typer.Option(
            min=1, max=1e6, help="Requests that may come at once; by default those of two seconds, 3 at least."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token. Prints it on standard output, once, and its entry for the service's tokens file on standard error."""
    if not TOKEN_NAME.fullmatch(name):
        raise typer.BadParameter(f"{name!r}: a name is 1 to 64 letters, digits, `.`, `_` and `-`", param_hint="'name'")
    if burst is not None and requests_per_second is None:
        raise typer.BadParameter("--burst needs --requests-per-second")
    made = new_token()
    entry = [f"[{json.dumps(name)}]", f'sha256 = "{hash_token(made)}"', f"scopes = {json.dumps([*map(str, scope)])}"]
    if tenant is not None:
        entry.append(f"tenants = {json.dumps(tenant)}")
    if requests_per_second is not None:
        entry.append(f"requests_per_second = {requests_per_second}")
    if burst is not None:
        entry.append(f"burst = {burst}")
    err.print("\n".join(entry), markup=False, highlight=False, soft_wrap=True)
    print_result(made, {"name": name, "token": made}, as_json=as_json)
