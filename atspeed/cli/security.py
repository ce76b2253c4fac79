"""`atspeed certificates` and `atspeed token`: what a secured service is set up with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from atspeed.cli.options import CommandError, err, optional
from atspeed.security.scopes import Scope
from atspeed.security.tokens import TOKEN_NAME, hash_token, new_token


def certificates(folder: Annotated[Path, typer.Argument(help="Where to write them.", file_okay=False)]) -> None:
    """Throwaway certificates of a throwaway CA, a folder for each service, to try TLS with. Not for production."""
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{folder}: is not empty; certificates of another CA would not fit what is there")
    made = optional("atspeed.local.certificates").LocalCertificates(folder)
    for path in sorted(path for path in made.folder.rglob("*") if path.is_file()):
        print(path)


def token(
    name: Annotated[str, typer.Argument(help="Whose it will be: letters, digits, `.`, `_`, `-`.")],
    scope: Annotated[list[Scope], typer.Option(help="What it allows; several times for several.")],
    tenant: Annotated[
        list[str] | None,
        typer.Option(help="The only tenants that it may name; without, any. '' is the one without a name."),
    ] = None,
) -> None:
    """A new token: on standard output, this once; on standard error, its entry for the service's tokens file."""
    if not TOKEN_NAME.fullmatch(name):
        raise CommandError(f"{name!r}: a name is 1 to 64 letters, digits, `.`, `_` and `-`")
    made = new_token()
    entry = [f"[{json.dumps(name)}]", f'sha256 = "{hash_token(made)}"', f"scopes = {json.dumps([*map(str, scope)])}"]
    if tenant is not None:
        entry.append(f"tenants = {json.dumps(tenant)}")
    err.print("\n".join(entry), markup=False, highlight=False, soft_wrap=True)
    print(made)
