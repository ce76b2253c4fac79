"""An opened bundle: catalogue, quantiser and models, checked against the manifest."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from atspeed.engine.bundle.bundle_files import check_digest, files_below, sha256_of
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import (
    MANIFEST,
    SIGNATURE,
    Manifest,
    ModelEntry,
    Role,
    fingerprint,
    folder_of,
    is_in,
    read_manifest,
)
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.bundle.quantiser import FILE as CODEBOOKS
from atspeed.engine.bundle.quantiser import FOLDER as QUANTISER
from atspeed.engine.bundle.quantiser import Quantiser
from atspeed.engine.bundle.titles import TITLE_FILES
from atspeed.engine.errors import BundleError


class Bundle:
    """An opened bundle directory.

    Raises BundleError, naming the file and the field, when this version cannot serve it.

    Attributes:
        root: the directory.
        manifest: its manifest, which is read from it unless it is given.
    """

    def __init__(self, root: Path, manifest: Manifest | None = None) -> None:
        self.root = root
        self.manifest = manifest or read_manifest(root)

    def catalogue(self) -> Catalogue:
        """Load the catalogue. Check that its version is the manifest's and that the models can read its items."""
        self._check_titles()
        catalogue = Catalogue.load(self.root / "catalogue")
        if catalogue.version != self.manifest.catalogue_version:
            expected = self.manifest.catalogue_version
            raise BundleError(f"{self.root}/catalogue: version {catalogue.version}, the manifest says {expected}")
        for role, model in self.manifest.models.items():
            self._check_reads(role, model, catalogue)
        return catalogue

    def _check_titles(self) -> None:
        """Compare the titles' hashes with the manifest's: they are no part of the catalogue's version."""
        for name in TITLE_FILES:
            if os.path.lexists(self.root / "catalogue" / name):
                path = f"catalogue/{name}"
                check_digest(self.root, path, sha256_of(self.root, path), self.manifest.files)

    def quantiser(self, catalogue: Catalogue) -> Quantiser:
        """Load the quantiser. Raises BundleError when the bundle has none, or one of other codes than the catalogue's."""
        entry, name = self.manifest.quantiser, f"{QUANTISER}/{CODEBOOKS}"
        if entry is None:
            raise BundleError(
                f"{self.root}/{MANIFEST}: quantiser: the bundle has none, as its code paths came with its data or checkpoint"
            )
        check_digest(self.root, name, sha256_of(self.root, name), self.manifest.files)
        quantiser = Quantiser.load(self.root / QUANTISER, entry)
        if quantiser.sizes != catalogue.trie.codebook_sizes:
            sizes, codes = list(quantiser.sizes), list(catalogue.trie.codebook_sizes)
            raise BundleError(f"{self.root}/{name}: codebooks of {sizes} codes, but the catalogue has {codes}")
        return quantiser

    def model_path(self, role: Role) -> Path:
        """Return the ONNX file of a role. Raises BundleError when the bundle has no such model."""
        return self.root / self.model(role).path

    def model(self, role: Role) -> ModelEntry:
        """Return the manifest's entry of a role. Raises BundleError when the bundle has no such model."""
        entry = self.manifest.models.get(role)
        if entry is None:
            raise BundleError(f"{self.root}/{MANIFEST}: the bundle has no {role} model")
        return entry

    def _check_reads(self, role: str, model: ModelEntry, catalogue: Catalogue) -> None:
        """Raise BundleError unless a model fits the catalogue.

        It needs a token for every code, and codes of one level need different ones. It needs positions for every prompt with its
        code path, and a plan scale for every planned level, if it has one.
        """
        manifest, trie = self.root / MANIFEST, catalogue.trie
        if len(model.code_tokens) != trie.columns:
            count = len(model.code_tokens)
            raise BundleError(f"{manifest}: {role}.code_tokens: {count} tokens for {trie.columns} code columns")
        for level, tokens in enumerate(np.split(np.asarray(model.code_tokens), trie.codebook_offset[1:])):
            if len(np.unique(tokens)) < len(tokens):
                raise BundleError(f"{manifest}: {role}.code_tokens: a token is used for two codes of level {level}")
        if model.heads and len(model.heads) != trie.levels - 1:
            raise BundleError(f"{manifest}: {role}.heads: {len(model.heads)} files for {trie.levels} levels of codes")
        if model.plan_scale is not None and len(model.plan_scale) != trie.levels - 1:
            count, levels = len(model.plan_scale), trie.levels
            raise BundleError(
                f"{manifest}: {role}.plan_scale: {count} scales for the {levels - 1} levels that are planned"
            )
        texts = model.prompt.texts
        if texts is not None and texts.catalogue != catalogue.version:
            raise BundleError(
                f"{manifest}: {role}.prompt.texts: are those of the items of catalogue {texts.catalogue}, not of "
                f"{catalogue.version}; import the checkpoint with the new items"
            )
        longest = model.prompt.max_tokens(catalogue.longest_spelling) + trie.levels - 1
        if longest > model.max_positions:
            raise BundleError(
                f"{manifest}: {role}.max_positions: {model.max_positions}, but prompt and codes take up to {longest}"
            )

    def verify(self, *, but: Role | None = None) -> None:
        """Read every file and compare its hash with the manifest's. Raises BundleError naming the first that differs.

        but: a role whose files are checked elsewhere, by `model_files` or `verify_model`.
        """
        digests = self.manifest.files
        later = folder_of(self.model(but).path) if but else None
        for name in digests:
            if not is_in(name, later):
                check_digest(self.root, name, sha256_of(self.root, name), digests)
        for name in files_below(self.root):
            if name not in digests and name not in {MANIFEST, SIGNATURE} and not _is_note(name):
                raise BundleError(f"{self.root}/{name}: not in the manifest")
        for role, model in self.manifest.models.items():
            if model.fingerprint != fingerprint(digests, folder_of(model.path)):
                raise BundleError(
                    f"{self.root}/{MANIFEST}: {role}.fingerprint: differs from the hash of the model's files"
                )

    def verify_model(self, role: Role) -> None:
        """Compare the hashes of one role's files. Raises BundleError naming the first that differs."""
        digests, folder = self.manifest.files, folder_of(self.model(role).path)
        for name in (name for name in digests if is_in(name, folder)):
            check_digest(self.root, name, sha256_of(self.root, name), digests)

    def model_files(self, path: str, *, verified: bool = False) -> ModelFiles:
        """Read a graph of the bundle and its weights. Raises BundleError naming the file.

        verified: compare the bytes with the manifest's hashes.
        """
        folder = folder_of(path)
        digests = {
            name[len(folder) + 1 :]: digest for name, digest in self.manifest.files.items() if is_in(name, folder)
        }
        return ModelFiles.read(self.root / path, digests if verified else None)


def _is_note(name: str) -> bool:
    """Return whether a file belongs to a hub or to people. A model hub adds these to a snapshot, and no service reads them."""
    return name.startswith(".") or name in {"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"}
