"""Manifest and files of a bundle: errors name the file and the field, and `verify` finds every change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import MANIFEST, fingerprint, hash_files, write_manifest
from atspeed.engine.errors import BundleError, CatalogueError
from atspeed.engine.search.scoring import ScoringRule
from tests.placeholder_bundles import placeholder_bundle, placeholder_entry

CATALOGUE = Catalogue.build(["a", "b", "c"], np.array([[0, 0], [0, 1], [1, 1]]), (2, 2))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return placeholder_bundle(tmp_path, CATALOGUE).root


def change(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest's JSON in place."""
    document = json.loads((root / MANIFEST).read_text())
    edit(document)
    (root / MANIFEST).write_text(json.dumps(document))


def test_written_bundle_opens_and_verifies(root: Path) -> None:
    bundle = Bundle(root)
    bundle.verify()
    assert bundle.catalogue().version == CATALOGUE.version
    assert bundle.model_path("draft") == root / "draft/model.onnx"
    assert bundle.model("target") == placeholder_entry("target", bundle.manifest.files, columns=4)
    assert not list(root.glob("*.partial"))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda m: m.update(format_version=2), "format_version"),
        (lambda m: m.update(name="Not A Name"), "name"),
        (lambda m: m.update(scoring_rule="best"), "scoring_rule"),
        (lambda m: m.pop("catalogue_version"), "catalogue_version"),
        (lambda m: m.pop("target"), "target"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.update(items_per_path=0), "items_per_path"),
        (lambda m: m["draft"].update(precision="float8"), r"draft\.precision"),
        (lambda m: m["target"].update(layers=0), r"target\.layers"),
        (
            lambda m: m["draft"]["prompt"].update(
                user_fields=[{"name": "age", "part": "prefix", "at": 1, "values": {"old": [1]}}]
            ),
            r"draft\.prompt\.user_fields: age: must have a default",
        ),
        (lambda m: m["target"]["prompt"].update(prefix=[]), r"target.*prompt\.prefix"),
        (lambda m: m["target"].update(encoder={"path": "draft/e.onnx", "decoder_start": 0}), r"target.*encoder\.path"),
        (
            lambda m: m["target"].update(encoder={"path": "target/e", "decoder_start": 8}),
            r"target.*encoder\.decoder_start",
        ),
        (
            lambda m: m["target"].update(encoder={"path": "target/e", "decoder_start": -1}),
            r"target\.encoder\.decoder_start",
        ),
        (lambda m: m["target"].update(encoder={"path": "target/e"}), r"target\.encoder\.decoder_start"),
        (
            lambda m: m["target"].update(encoder={"path": "target/e", "decoder_start": 0}, prompt={"prefix": []}),
            r"target.*prompt\.suffix",
        ),
        (lambda m: m["target"]["prompt"].update(drop_block=99), r"target\.prompt.*drop_block"),
        (lambda m: m["target"].update(code_tokens=[3, 4, 5, 8]), r"target.*code_tokens"),
        (lambda m: m["draft"].update(code_tokens=[3, 4, 5, 8]), r"draft.*code_tokens"),
        (lambda m: m["draft"].update(code_tokens=[]), r"draft.*code_tokens"),
        (lambda m: m["target"].update(code_tokens=[3, 4, 5, -1]), r"target.*code_tokens"),
        (lambda m: m["target"]["prompt"].update(suffix=[8]), r"target.*prompt"),
        (lambda m: m["target"].update(plan_scale=[1.0]), r"target\.plan_scale"),
        *[
            (lambda m, scale=scale: m["draft"].update(plan_scale=[scale]), r"draft\.plan_scale\.0")
            for scale in (0.0, -1.0, float("nan"), float("inf"), "wide")
        ],
    ],
)
def test_invalid_field_is_named(root: Path, edit: Callable[[dict[str, Any]], object], named: str) -> None:
    """With the file, at start, and not by the first request that meets it."""
    change(root, edit)
    with pytest.raises(BundleError, match=rf"manifest\.json: .*{named}"):
        Bundle(root)


def test_missing_or_invalid_manifest_is_named(root: Path, tmp_path: Path) -> None:
    (root / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match=r"manifest\.json: .*JSON"):
        Bundle(root)
    (root / MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"manifest\.json: No such file"):
        Bundle(root)


def test_a_catalogue_of_another_version_is_refused(root: Path) -> None:
    Catalogue.build(["a", "b", "z"], np.array([[0, 0], [0, 1], [1, 1]]), (2, 2)).save(root / "catalogue")
    with pytest.raises(BundleError, match=r"catalogue: version .*, the manifest says"):
        Bundle(root).catalogue()
    (root / "catalogue/codes.npy").write_bytes(b"")
    with pytest.raises(CatalogueError, match=r"codes\.npy"):
        Bundle(root).catalogue()


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_model_too_short_for_the_longest_prompt_is_refused(root: Path, role: str) -> None:
    """A prefix token, 20 items of 2 codes, and the first code of the answer: 42 positions."""
    change(root, lambda m: m[role].update(max_positions=42))
    Bundle(root).catalogue()
    change(root, lambda m: m[role].update(max_positions=41))
    with pytest.raises(BundleError, match=rf"manifest\.json: {role}\.max_positions: 41, but .* up to 42"):
        Bundle(root).catalogue()


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_model_with_too_few_code_tokens_for_the_catalogue_is_refused(root: Path, role: str) -> None:
    change(root, lambda m: m[role].update(code_tokens=[3, 4, 5]))
    with pytest.raises(BundleError, match=rf"manifest\.json: {role}\.code_tokens: 3 tokens for 4 code columns"):
        Bundle(root).catalogue()


@pytest.mark.parametrize("role", ["target", "draft"])
def test_levels_may_share_tokens_and_codes_of_a_level_may_not(root: Path, role: str) -> None:
    change(root, lambda m: m[role].update(code_tokens=[3, 4, 4, 3]))
    Bundle(root).catalogue()
    change(root, lambda m: m[role].update(code_tokens=[3, 4, 5, 5]))
    with pytest.raises(
        BundleError, match=rf"manifest\.json: {role}\.code_tokens: a token is used for two codes of level 1"
    ):
        Bundle(root).catalogue()


def test_a_limit_of_items_per_path_is_served_and_written_only_where_it_is_set(root: Path) -> None:
    plain = Bundle(root).manifest
    assert plain.items_per_path is None
    assert "items_per_path" not in (root / MANIFEST).read_text()
    write_manifest(root, plain.model_copy(update={"items_per_path": 2}))
    limited = Bundle(root).manifest
    assert limited.items_per_path == 2
    assert limited.version != plain.version
    assert limited.model_version("target") == plain.model_version("target")


@pytest.mark.parametrize("scales", [[], [1.0, 1.0]])
def test_a_draft_has_one_scale_for_each_planned_level(root: Path, scales: list[float]) -> None:
    change(root, lambda m: m["draft"].update(plan_scale=[0.5]))
    Bundle(root).catalogue()
    change(root, lambda m: m["draft"].update(plan_scale=scales))
    with pytest.raises(BundleError, match=rf"manifest\.json: draft\.plan_scale: {len(scales)} scales for .* 1 levels"):
        Bundle(root).catalogue()


def test_scales_are_served_but_no_score_depends_on_them(root: Path) -> None:
    """Caches and open sessions outlive a new measurement; a manifest from before there were any reads and writes as it was."""
    before = (root / MANIFEST).read_text()
    plain = Bundle(root).manifest
    assert "plan_scale" not in before
    write_manifest(root, plain)
    assert (root / MANIFEST).read_text() == before
    change(root, lambda m: m["draft"].update(plan_scale=[0.5]))
    scaled = Bundle(root).manifest
    assert scaled.draft is not None
    assert scaled.draft.plan_scale == (0.5,)
    assert scaled.version != plain.version
    for role in ("target", "draft"):
        assert scaled.model_version(role) == plain.model_version(role)
    write_manifest(root, scaled)
    assert Bundle(root).manifest == scaled


def test_the_shipped_bundle_keeps_its_versions() -> None:
    """Keys of what others have cached."""
    manifest = Bundle(Path(__file__).parents[3] / "bundles/movielens-100k").manifest
    versions = (manifest.version, manifest.model_version("target"), manifest.model_version("draft"))
    assert versions == ("b818d9e17629ba46", "abc8ec1e7036a304", "047fd1d977cfacaa")


def test_bundle_without_a_draft_names_the_missing_model(root: Path) -> None:
    change(root, lambda m: m.update(draft=None))
    bundle = Bundle(root)
    bundle.catalogue()
    with pytest.raises(BundleError, match="no draft model"):
        bundle.model("draft")
    assert list(bundle.manifest.models) == ["target"]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda root: (root / "target/model.onnx").write_bytes(b"targeT"), "target/model.onnx: its SHA-256"),
        (lambda root: (root / "draft/model.onnx.data").write_bytes(bytes(99)), "draft/model.onnx.data: its SHA-256"),
        (lambda root: (root / "catalogue/ids.npy").unlink(), "catalogue/ids.npy: missing"),
        (lambda root: (root / "draft/model.onnx").rename(root / "draft/other.onnx"), "draft/model.onnx: missing"),
        (lambda root: (root / "extra").write_bytes(b""), "extra: not in the manifest"),
        (lambda root: (root / "target/.hidden").write_bytes(b""), "target/.hidden: not in the manifest"),
        (lambda root: (root / "target" / MANIFEST).write_bytes(b""), "target/manifest.json: not in the manifest"),
    ],
)
def test_verify_finds_every_kind_of_change(root: Path, edit: Callable[[Path], object], problem: str) -> None:
    bundle = Bundle(root)
    edit(root)
    with pytest.raises(BundleError, match=problem):
        bundle.verify()


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", ".cache/huggingface/download/x.lock"])
def test_verify_accepts_the_notes_that_a_hub_adds(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b"anything")
    Bundle(root).verify()


def test_version_depends_on_served_content_only(root: Path) -> None:
    """A new name or note keeps it; a changed file, rule or template does not."""
    manifest = Bundle(root).manifest
    same = manifest.model_copy(
        update={"name": "other", "provenance": manifest.provenance.model_copy(update={"data": "x"})}
    )
    assert same.version == manifest.version
    others = [
        manifest.model_copy(update={"scoring_rule": ScoringRule.TRIE}),
        manifest.model_copy(update={"allow_empty_history": True}),
        manifest.model_copy(update={"draft": None}),
        manifest.model_copy(update={"files": {**manifest.files, "target/model.onnx": "0" * 64}}),
    ]
    assert len({manifest.version, *(other.version for other in others)}) == 5


def test_a_fingerprint_is_of_one_models_files(root: Path) -> None:
    before = hash_files(root)
    (root / "draft/model.onnx.data").write_bytes(b"new weights")
    after = hash_files(root)
    assert fingerprint(before, "target") == fingerprint(after, "target")
    assert fingerprint(before, "draft") != fingerprint(after, "draft")
    assert fingerprint({"target2/x": "1"}, "target") == fingerprint({}, "target")


def test_foreign_fingerprint_is_refused(root: Path) -> None:
    """Cached keys and values are kept under the fingerprint, so one of other weights would be served with them."""
    change(root, lambda document: document["target"].update(fingerprint=document["draft"]["fingerprint"]))
    with pytest.raises(BundleError, match=r"target\.fingerprint"):
        Bundle(root).verify()


def test_default_draft_kind_is_not_written_and_keeps_the_version(root: Path) -> None:
    manifest = Bundle(root).manifest
    assert "draft_kind" not in (root / MANIFEST).read_text()
    assert manifest.draft is not None
    other = manifest.model_copy(update={"draft": manifest.draft.model_copy(update={"draft_kind": "other"})})
    write_manifest(root, other)
    read = Bundle(root).manifest
    assert read.draft is not None
    assert read.draft.draft_kind == "other"
    assert read.model_version("draft") != manifest.model_version("draft")


def test_target_has_no_draft_kind(root: Path) -> None:
    change(root, lambda document: document["target"].update(draft_kind="other"))
    with pytest.raises(BundleError, match=r"target\.draft_kind: only a draft has one"):
        Bundle(root)
