"""Commands on a bundle: inspect, verify, sign, push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atspeed.artefacts.bundle_source import LinkSource
from atspeed.artefacts.object_store import check_url
from atspeed.artefacts.transfer import pull_bundle, push_bundle
from atspeed.cli import display
from atspeed.cli.commands import Commands
from atspeed.cli.options import AsJson, optional, out, print_result
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import MANIFEST, SIGNATURE, read_manifest
from atspeed.engine.errors import BundleError
from atspeed.engine.model.provider import Provider

bundle_commands = Commands(help="Inspect, verify, sign, push and pull a bundle.")


def _url(value: str | None) -> str | None:
    try:
        return check_url(value) if value else value
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


ShownBundle = Annotated[Path, typer.Argument(help="Folder of the bundle.", exists=True, file_okay=False)]
Url = Annotated[
    str, typer.Argument(help="URL: s3://, gs://, hf://, https:// or another that fsspec knows.", callback=_url)
]
PublicKey = Annotated[
    Path | None,
    typer.Option(
        help="Public keys, PEM, of which one must have signed the bundle.",
        envvar="ATSPEED_BUNDLE_PUBLIC_KEY",
        exists=True,
        dir_okay=False,
    ),
]


@bundle_commands.command("inspect")
def bundle_inspect(folder: ShownBundle, as_json: AsJson = False) -> None:
    """Print the content of a bundle."""
    bundle = Bundle(folder)
    if as_json:
        print(bundle.manifest.model_dump_json(indent=1))
        return
    catalogue = bundle.catalogue()
    out.print(display.manifest_table(bundle.manifest, catalogue.items, len(catalogue.item_start) - 1))


@bundle_commands.command("verify")
def bundle_verify(
    folder: ShownBundle,
    provider: Annotated[Provider, typer.Option(help="Device of the passes.")] = "cpu",
    public_key: PublicKey = None,
    as_json: AsJson = False,
) -> None:
    """Check file hashes, catalogue version and graphs, and that a pass over each token of a request is finite.

    With --public-key, the signature is checked first.
    """
    from atspeed.engine.model.bundle_check import verify_bundle

    if public_key:
        _check_signature(folder, public_key)
    bundle = verify_bundle(folder, provider=provider)
    _say_checked(folder, bundle, public_key, as_json=as_json)


@bundle_commands.command("sign")
def bundle_sign(
    folder: ShownBundle,
    key: Annotated[
        Path, typer.Option(help="Private key on P-256, P-384 or P-521, PEM, unencrypted.", exists=True, dir_okay=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Check a bundle's files and write its signature, in the format of OpenSSF model signing."""
    optional("atspeed.artefacts.signature").sign_bundle(folder, key)
    version = read_manifest(folder).version
    text = f"{folder}: {SIGNATURE} signs version {version}"
    print_result(text, {"signature": folder / SIGNATURE, "version": version}, as_json=as_json)


@bundle_commands.command("push")
def bundle_push(
    folder: ShownBundle,
    url: Url,
    link: Annotated[
        str | None,
        typer.Option(
            help="URL beside the bundle's that services follow, such as s3://BUCKET/current; it names the bundle from then on.",
            callback=_url,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a bundle to a URL, read it back, and let a link name it."""
    bundle = push_bundle(folder, url, link)
    text = f"{url}: version {bundle.manifest.version}" + (f", named by {link}" if link else "")
    print_result(text, {"url": url, "version": bundle.manifest.version, "link": link}, as_json=as_json)


@bundle_commands.command("pull")
def bundle_pull(
    url: Url,
    folder: Annotated[Path, typer.Argument(help="New folder for the bundle.", file_okay=False)],
    public_key: PublicKey = None,
    as_json: AsJson = False,
) -> None:
    """Copy the bundle that a URL names into a new folder, and check it."""
    keys = optional("atspeed.artefacts.signature").TrustedKeys(public_key) if public_key else None
    bundle = pull_bundle(url, folder, keys)
    _say_checked(folder, bundle, public_key, as_json=as_json)


def _say_checked(folder: Path, bundle: Bundle, public_key: Path | None, *, as_json: bool) -> None:
    signed = f", signed by a key of {public_key}" if public_key else ""
    version, files = bundle.manifest.version, len(bundle.manifest.files)
    text = f"{folder}: {files} files match the manifest, version {version}{signed}"
    fields = {"bundle": folder, "version": version, "files": files, "signed_by_key": public_key}
    print_result(text, fields, as_json=as_json)


def _check_signature(folder: Path, public_key: Path) -> None:
    keys = optional("atspeed.artefacts.signature").TrustedKeys(public_key)
    named = LinkSource(folder, keys).look()
    if named is None:
        raise BundleError(f"{folder / MANIFEST}: No such file or directory")
    named.version()
