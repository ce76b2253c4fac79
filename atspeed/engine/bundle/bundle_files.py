"""Access to a bundle's files on disk, through links, with checked hashes.

A download cache links each file, a Kubernetes volume links each folder. Both kinds of links are followed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from atspeed.engine.errors import BundleError


def files_below(root: Path) -> list[str]:
    """List the files below a folder, by relative path, sorted. Links are followed.

    Names in `root` that begin with two dots are skipped: Kubernetes keeps a volume's versions there. Raises BundleError when a
    folder cannot be read, or is a link to a folder above it.
    """
    try:
        inside = [entry for entry in root.iterdir() if not entry.name.startswith("..")]
        found = [path for entry in inside for path in _expanded(entry, (root.resolve(),))]
    except OSError as error:
        raise BundleError(f"{error.filename or root}: {error.strerror or error}") from error
    return sorted(path.relative_to(root).as_posix() for path in found)


def _expanded(entry: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    if not entry.is_dir():
        yield entry
        return
    folder = entry.resolve()
    if folder in above:
        raise BundleError(f"{entry}: a link to a folder above it")
    for child in entry.iterdir():
        yield from _expanded(child, (*above, folder))


def check_is_file(root: Path, name: str) -> None:
    """Raise BundleError with the reason unless the name leads to a regular file. Reading a pipe might never end."""
    path = root / name
    try:
        if path.is_file():
            return
        for part in (path, *list(path.parents)[: name.count("/")]):
            if part.is_symlink() and not part.exists():
                raise BundleError(f"{part}: a link to {part.readlink()}, which does not exist")
        problem = "not a regular file" if path.exists() else "missing"
    except OSError as error:
        problem = error.strerror or str(error)
    raise BundleError(f"{path}: {problem}")


def read_file(root: Path, name: str, digests: Mapping[str, str] | None = None) -> bytes:
    """Read a file of a bundle into memory. Raises BundleError naming the file.

    digests: SHA-256 by name; the returned bytes have the file's. None for no check.
    """
    check_is_file(root, name)
    try:
        content = (root / name).read_bytes()
    except OSError as error:
        raise BundleError(f"{root / name}: {error.strerror}") from error
    if digests is not None:
        check_digest(root, name, hashlib.sha256(content).hexdigest(), digests)
    return content


def sha256_of(root: Path, name: str) -> str:
    """Return the SHA-256 of a file of a bundle. Raises BundleError naming the file when it cannot be read."""
    check_is_file(root, name)
    try:
        with (root / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{root / name}: {error.strerror}") from error


def check_digest(root: Path, name: str, digest: str, digests: Mapping[str, str]) -> None:
    """Raise BundleError, naming the file, unless `digest` is its SHA-256 in `digests`."""
    if name not in digests:
        raise BundleError(f"{root / name}: not in the manifest")
    if digest != digests[name]:
        raise BundleError(f"{root / name}: its SHA-256 differs from the manifest's")


def link_or_copy(source: Path, path: Path) -> None:
    """Make a hard link to a file, or a copy if the file system has no hard links.

    If `source` is a symbolic link, its file is linked: a relative link would lead elsewhere from another folder.
    """
    try:
        os.link(source.resolve(), path)
    except OSError:
        shutil.copy2(source, path)
