"""Bundles whose model files are placeholders, for tests that load no model."""

from __future__ import annotations

from pathlib import Path

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Manifest, ModelEntry, fingerprint, hash_files, write_manifest
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.search.scoring import ScoringRule


def placeholder_entry(role: str, files: dict[str, str], columns: int) -> ModelEntry:
    """The manifest's entry of a placeholder. files: hashes of the bundle's files."""
    return ModelEntry(
        path=f"{role}/model.onnx",
        architecture="llama",
        precision="float32",
        parameters=10,
        vocab_size=4 + columns,
        layers=1,
        kv_heads=1,
        head_dim=2,
        max_positions=64,
        code_tokens=tuple(range(3, 3 + columns)),
        prompt=PromptTemplate(prefix=(1,)),
        fingerprint=fingerprint(files, role),
    )


def placeholder_bundle(root: Path, catalogue: Catalogue) -> Bundle:
    """Write a bundle without models."""
    catalogue.save(root / "catalogue")
    for role in ("target", "draft"):
        (root / role).mkdir()
        (root / role / "model.onnx").write_bytes(role.encode())
        (root / role / "model.onnx.data").write_bytes(bytes(100))
    files = hash_files(root)
    columns = catalogue.trie.columns
    manifest = Manifest(
        name="small",
        scoring_rule=ScoringRule.VOCAB,
        catalogue_version=catalogue.version,
        target=placeholder_entry("target", files, columns),
        draft=placeholder_entry("draft", files, columns),
        files=files,
    )
    write_manifest(root, manifest)
    return Bundle(root)
