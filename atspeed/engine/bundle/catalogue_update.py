"""A bundle with another catalogue on the same models: items added, others taken out.

Codebooks stay, so both models read the new items as they are; how well they recommend them is another matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Bundle, hash_files, link_or_copy, write_manifest
from atspeed.engine.errors import CatalogueError


def updated_catalogue(catalogue: Catalogue, added: Mapping[str, tuple[int, ...]], removed: Iterable[str]) -> Catalogue:
    """The catalogue with items added, by id with their code paths, and others taken out.

    Raises CatalogueError, naming the item, when one to remove is not there, one to add is, or a path is not of the codebooks.
    """
    sizes, gone = catalogue.trie.codebook_sizes, list(removed)
    index = catalogue.find(gone)
    if len(index) and index.min() < 0:
        raise CatalogueError(f"remove: {gone[int(index.argmin())]!r} is not in the catalogue")
    for item, path in added.items():
        if len(path) != len(sizes) or any(not 0 <= code < size for code, size in zip(path, sizes, strict=True)):
            raise CatalogueError(f"add: {item!r}: {list(path)} is not a code path of the codebooks {list(sizes)}")
    kept = np.setdiff1d(np.arange(catalogue.items), index)
    ids = [catalogue.id_of(int(item)) for item in kept] + list(added)
    codes = [catalogue.codes[kept], np.array(list(added.values()), dtype=np.int32).reshape(-1, len(sizes))]
    return Catalogue.build(ids, np.concatenate(codes), sizes)


def update_catalogue(bundle: Bundle, out: Path, added: Mapping[str, tuple[int, ...]], removed: Iterable[str]) -> Bundle:
    """Write the bundle with the other catalogue to `out`, which must not exist. The models' files are linked or copied.

    Raises CatalogueError as `updated_catalogue`, FileExistsError.
    """
    catalogue = updated_catalogue(bundle.catalogue(), added, removed)
    out.mkdir(parents=True)
    for name in bundle.manifest.files:
        if not name.startswith("catalogue/"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(bundle.root / name, out / name)
    catalogue.save(out / "catalogue")
    changed = {name: digest for name, digest in hash_files(out).items() if name.startswith("catalogue/")}
    kept = {name: digest for name, digest in bundle.manifest.files.items() if not name.startswith("catalogue/")}
    update = {"catalogue_version": catalogue.version, "files": kept | changed}
    write_manifest(out, bundle.manifest.model_copy(update=update))
    made = Bundle(out)
    made.catalogue()  # as services will read it
    return made
