"""Catalogue updates: a bundle with items added and removed, on the same models.

The codebooks stay, so both models can read the new items without training. The quality of their recommendations is not checked.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.bundle_files import read_file
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.bundle.manifest import hash_files, link_files, write_manifest
from atspeed.engine.errors import BundleError, CatalogueError, EngineError

CODE_NAMES = "code_names.json"  # in an imported bundle: the names of each level's codes


def codes_by_name(bundle: Bundle) -> list[dict[str, int]]:
    """Return the codes of each level by name; empty for a bundle whose codes have none. Raises BundleError."""
    if CODE_NAMES not in bundle.manifest.files:
        return []
    levels = json.loads(read_file(bundle.root, CODE_NAMES, bundle.manifest.files))
    return [{name: code for code, name in enumerate(names)} for names in levels]


def updated_catalogue(catalogue: Catalogue, added: Mapping[str, tuple[int, ...]], removed: Iterable[str]) -> Catalogue:
    """Return the catalogue with items added, by id with their code paths, and others removed.

    A code path is given without its tail. It ends as the catalogue's other paths of so many codes do. So a length whose last path
    was removed cannot be added again, except in the update that removes it. Added items come last among those of their path,
    unless the catalogue has the order of ids.

    Raises CatalogueError, naming the item, when an item to remove is unknown, an item to add is known, or a code path does not
    fit the codebooks.
    """
    sizes, gone = catalogue.trie.codebook_sizes, list(removed)
    index = catalogue.find(gone)
    if len(index) and index.min() < 0:
        raise CatalogueError(f"remove: {shown(gone[int(index.argmin())])} is not in the catalogue")
    endings, tails = _endings(catalogue), catalogue.tail_start.tolist()
    new = []
    for item, path in added.items():
        if len(path) not in endings:
            lengths = " or ".join(map(str, sorted(endings)))
            problem = (
                f"{list(path)} has {len(path)} codes; those of the catalogue have {lengths}, and only such can be added"
            )
            raise CatalogueError(f"add: {shown(item)}: {problem}")
        if any(not 0 <= code < tail for code, tail in zip(path, tails, strict=False)):
            raise CatalogueError(f"add: {shown(item)}: {list(path)} is not a code path of the codebooks {list(sizes)}")
        if len(endings[len(path)]) > 1:
            raise CatalogueError(f"add: {shown(item)}: paths of {len(path)} codes have several tails in the catalogue")
        new.append((*path, *endings[len(path)][0]))
    kept = np.setdiff1d(np.arange(catalogue.items), index)
    if not len(kept) and not added:
        raise CatalogueError("remove: no item would be left")
    ids = [catalogue.id_of(int(item)) for item in kept] + list(added)
    codes = np.concatenate([catalogue.codes[kept], np.array(new, dtype=np.int32).reshape(-1, len(sizes))])
    rank = None if catalogue.in_order_of_ids else np.append(kept, np.full(len(new), catalogue.items))
    return Catalogue.build(ids, codes, sizes, tail_start=tails, rank=rank)


def _endings(catalogue: Catalogue) -> dict[int, list[tuple[int, ...]]]:
    """Return what follows the codes in the catalogue's paths, tail and ended places, by the number of codes."""
    first = catalogue.item_start[:-1]
    paths, lengths = catalogue.codes[first], catalogue.spelled_lengths(first)
    return {
        length: [tuple(ending) for ending in np.unique(paths[lengths == length, length:], axis=0).tolist()]
        for length in np.unique(lengths).tolist()
    }


def update_catalogue(
    bundle: Bundle,
    out: Path,
    added: Mapping[str, tuple[int, ...]],
    removed: Iterable[str],
    titles: Mapping[str, str] | None = None,
) -> Bundle:
    """Write the bundle with the updated catalogue to `out`, which must not exist. The models' files are linked or copied.

    titles: new titles by item id. Items keep the title that they have.

    The bundle appears in one step, after it has been read back as a service reads it. A failure leaves no files. Raises
    CatalogueError as `updated_catalogue` and for the title of an unknown item, BundleError when a file differs from the manifest,
    and OSError.
    """
    if os.path.lexists(out):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
    if out.resolve().is_relative_to(bundle.root.resolve()):
        raise BundleError(f"{out}: inside {bundle.root}, which could then no longer be verified")
    before = bundle.catalogue()
    catalogue = updated_catalogue(before, added, removed) if added or removed else before
    catalogue = _titled(catalogue, before, titles or {})
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with the same id
    try:
        _write(bundle, catalogue, partial)
        _read_back(partial, bundle.root, out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle(out)


def _titled(catalogue: Catalogue, before: Catalogue, titles: Mapping[str, str]) -> Catalogue:
    """Return the catalogue with the titles that its items had before, or get now."""
    if (unknown := catalogue.find(titles)).min(initial=0) < 0:
        raise CatalogueError(f"titles: {shown(list(titles)[int(unknown.argmin())])} is not in the catalogue")
    kept = before.titles_of(before.id_of(item) for item in range(before.items)) if before.titles else {}
    return catalogue.with_titles(kept | dict(titles))


def _write(bundle: Bundle, catalogue: Catalogue, out: Path) -> None:
    kept = {name: digest for name, digest in bundle.manifest.files.items() if not name.startswith("catalogue/")}
    out.mkdir()
    link_files(bundle.root, kept, out)
    catalogue.save(out / "catalogue")
    changed = {name: digest for name, digest in hash_files(out).items() if name.startswith("catalogue/")}
    update = {"catalogue_version": catalogue.version, "files": kept | changed}
    write_manifest(out, bundle.manifest.model_copy(update=update))


def _read_back(written: Path, source: Path, out: Path) -> None:
    """Raise unless the written bundle can be served. Errors outside the catalogue name the source: its files are linked."""
    made = Bundle(written)
    try:
        made.verify()
        made.catalogue()
    except EngineError as error:
        at_fault = out if f"{written}/catalogue" in str(error) else source
        raise type(error)(str(error).replace(str(written), str(at_fault))) from error
