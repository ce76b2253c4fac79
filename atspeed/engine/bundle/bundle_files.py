"""A bundle's files as they lie on disk: found, read and checked, through links of files and of folders.

A download cache links each file, a Kubernetes volume links each folder. Both are followed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from atspeed.engine.errors import BundleError


def files_below(root: Path) -> list[str]:
    """Paths below a folder, relative to it, of all that is no folder; links are followed. Sorted.

    Names in `root` that begin with two dots are left out: Kubernetes keeps a volume's versions there.
    Raises BundleError when a folder cannot be read, or when it is a link to one above it.
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
    """Raise BundleError, saying why, unless the name leads to a regular file. A pipe would be waited for without end."""
    path = root / name
    try:
        if path.is_file():
            return
        for part in (path, *list(path.parents)[: name.count("/")]):
            if part.is_symlink() and not part.exists():
                raise BundleError(f"{part}: a link to {part.readlink()}, which is not there")
        problem = "not a regular file" if path.exists() else "missing"
    except OSError as error:
        problem = error.strerror or str(error)
    raise BundleError(f"{path}: {problem}")


def read_file(root: Path, name: str, digests: Mapping[str, str] | None = None) -> bytes:
    """The content of a file below a bundle. Later changes of the file do not reach it.

    digests: SHA-256 by name, which the bytes must have that are returned. Raises BundleError naming the file.
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
    """The SHA-256 of a file below a bundle. Raises BundleError naming the file when it cannot be read."""
    check_is_file(root, name)
    try:
        with (root / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{root / name}: {error.strerror}") from error


def check_digest(root: Path, name: str, digest: str, digests: Mapping[str, str]) -> None:
    """Raise BundleError, naming the file, unless it has its SHA-256 among `digests`."""
    if name not in digests:
        raise BundleError(f"{root / name}: not in the manifest")
    if digest != digests[name]:
        raise BundleError(f"{root / name}: its SHA-256 is not the manifest's")


def link_or_copy(source: Path, path: Path) -> None:
    """The same file at another path: a hard link, or a copy where the file system can have none.

    Where `source` is a link itself, its file is meant: another link to it would lead elsewhere from another folder.
    """
    try:
        os.link(source.resolve(), path)
    except OSError:
        shutil.copy2(source, path)
