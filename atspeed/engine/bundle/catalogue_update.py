"""A bundle with another catalogue on the same models: items added, others taken out.

Codebooks stay, so both models read the new items as they are; how well they recommend them is another matter.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.bundle.manifest import Bundle, hash_files, link_files, write_manifest
from atspeed.engine.errors import BundleError, CatalogueError, EngineError


def updated_catalogue(catalogue: Catalogue, added: Mapping[str, tuple[int, ...]], removed: Iterable[str]) -> Catalogue:
    """The catalogue with items added, by id with their code paths, and others taken out.

    Raises CatalogueError, naming the item, when one to remove is not there, one to add is, or a path is not of the codebooks.
    """
    sizes, gone = catalogue.trie.codebook_sizes, list(removed)
    index = catalogue.find(gone)
    if len(index) and index.min() < 0:
        raise CatalogueError(f"remove: {shown(gone[int(index.argmin())])} is not in the catalogue")
    for item, path in added.items():
        if len(path) != len(sizes) or any(not 0 <= code < size for code, size in zip(path, sizes, strict=True)):
            raise CatalogueError(f"add: {shown(item)}: {list(path)} is not a code path of the codebooks {list(sizes)}")
    kept = np.setdiff1d(np.arange(catalogue.items), index)
    ids = [catalogue.id_of(int(item)) for item in kept] + list(added)
    codes = [catalogue.codes[kept], np.array(list(added.values()), dtype=np.int32).reshape(-1, len(sizes))]
    return Catalogue.build(ids, np.concatenate(codes), sizes)


def update_catalogue(bundle: Bundle, out: Path, added: Mapping[str, tuple[int, ...]], removed: Iterable[str]) -> Bundle:
    """Write the bundle with the other catalogue to `out`, which must not exist. The models' files are linked or copied.

    It appears in one step, once it has been read back as a service reads it; what fails on the way leaves nothing.
    Raises CatalogueError as `updated_catalogue`, BundleError when a file is not the one that the manifest names, OSError.
    """
    if os.path.lexists(out):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
    if out.resolve().is_relative_to(bundle.root.resolve()):
        raise BundleError(f"{out}: inside {bundle.root}, which could then no longer be verified")
    catalogue = updated_catalogue(bundle.catalogue(), added, removed)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed and had the same number
    try:
        _write(bundle, catalogue, partial)
        _read_back(partial, bundle.root, out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle(out)


def _write(bundle: Bundle, catalogue: Catalogue, out: Path) -> None:
    kept = {name: digest for name, digest in bundle.manifest.files.items() if not name.startswith("catalogue/")}
    out.mkdir()
    link_files(bundle.root, kept, out)
    catalogue.save(out / "catalogue")
    changed = {name: digest for name, digest in hash_files(out).items() if name.startswith("catalogue/")}
    update = {"catalogue_version": catalogue.version, "files": kept | changed}
    write_manifest(out, bundle.manifest.model_copy(update=update))


def _read_back(written: Path, source: Path, out: Path) -> None:
    """Raise unless what was written can be served. All of it but the catalogue is the source's, which is then at fault."""
    made = Bundle(written)
    try:
        made.verify()
        made.catalogue()
    except EngineError as error:
        at_fault = out if f"{written}/catalogue" in str(error) else source
        raise type(error)(str(error).replace(str(written), str(at_fault))) from error
