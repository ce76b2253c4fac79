"""Files of a bundle behind links: they are followed, or refused with the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import MANIFEST, hash_files
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.loading import load_decoder
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.layouts import LAYOUTS, Layout, download_cache


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "plain", random_catalogue(20, (4, 4), seed=0)).bundle


@pytest.mark.parametrize("layout", LAYOUTS)
def test_links_of_files_and_folders_are_followed(plain: Bundle, tmp_path: Path, layout: Layout) -> None:
    linked = Bundle(layout(plain.root, tmp_path / "linked"))
    linked.verify()
    assert linked.catalogue().version == plain.manifest.catalogue_version
    assert hash_files(linked.root) == plain.manifest.files
    assert load_decoder(linked, "target", RuntimeOptions(), verified=True).columns == 8
    (linked.root / "extra").mkdir()
    (linked.root / "extra" / "file").touch()
    with pytest.raises(BundleError, match="extra/file: not in the manifest"):
        linked.verify()


def dangling_file(root: Path) -> None:
    (root / "target/model.onnx").unlink()
    (root / "target/model.onnx").symlink_to("gone")


def dangling_folder(root: Path) -> None:
    (root / "target").rename(root.parent / "elsewhere")
    (root / "target").symlink_to("gone")


def circle_of_files(root: Path) -> None:
    (root / "target/model.onnx").unlink()
    (root / "target/model.onnx").symlink_to("model.onnx")


def circle_of_folders(root: Path) -> None:
    (root / "target" / "again").symlink_to("..")


def pipe(root: Path) -> None:
    (root / "target/model.onnx").unlink()
    os.mkfifo(root / "target/model.onnx")


def folder(root: Path) -> None:
    (root / "target/model.onnx").unlink()
    (root / "target/model.onnx").mkdir()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (dangling_file, "target/model.onnx: a link to gone, which does not exist"),
        (dangling_folder, "target: a link to gone, which does not exist"),
        (circle_of_files, "target/model.onnx: a link to model.onnx, which does not exist"),
        (circle_of_folders, "target/again: a link to a folder above it"),
        (pipe, "target/model.onnx: not a regular file"),
        (folder, "target/model.onnx: not a regular file"),
    ],
)
def test_unreadable_file_or_link_is_named(
    plain: Bundle, tmp_path: Path, damage: Callable[[Path], None], problem: str
) -> None:
    """A pipe would be waited for without end, a circle would be gone round."""
    bundle = Bundle(download_cache(plain.root, tmp_path / "linked"))
    damage(bundle.root)
    with pytest.raises(BundleError, match=problem):
        bundle.verify()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", "a//b", "./a", "", ".", MANIFEST, "a\0b"])
def test_manifest_refuses_files_outside_the_bundle(plain: Bundle, tmp_path: Path, name: str) -> None:
    """Its files are read, and linked into other bundles."""
    document = json.loads((plain.root / MANIFEST).read_text())
    document["files"][name] = "0" * 64
    (tmp_path / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"manifest\.json: files.*not the path of a file inside the bundle"):
        Bundle(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_loaded_bytes_are_the_checked_bytes(plain: Bundle, tmp_path: Path, name: str) -> None:
    bundle = Bundle(download_cache(plain.root, tmp_path / "linked"))
    with (bundle.root / "target" / name).open("r+b") as file:
        file.write(b"x")
    bundle.verify(but="target")
    with pytest.raises(BundleError, match=f"target/{name}: its SHA-256 differs from the manifest's"):
        bundle.model_files("target/model.onnx", verified=True)
    with pytest.raises(BundleError, match=f"target/{name}: its SHA-256 differs from the manifest's"):
        bundle.verify_model("target")
    bundle.model_files("draft/model.onnx", verified=True)
    bundle.verify_model("draft")


def test_weights_that_the_manifest_does_not_list_are_not_loaded(plain: Bundle, tmp_path: Path) -> None:
    bundle = Bundle(download_cache(plain.root, tmp_path / "linked"))
    files = {
        name: digest for name, digest in bundle.manifest.files.items() if not name.endswith("target/model.onnx.data")
    }
    bundle.manifest = bundle.manifest.model_copy(update={"files": files})
    with pytest.raises(BundleError, match=r"target/model\.onnx\.data: not in the manifest"):
        load_decoder(bundle, "target", RuntimeOptions(), verified=True)


def test_model_files_reads_only_files_that_the_graph_names(plain: Bundle, tmp_path: Path) -> None:
    root = download_cache(plain.root, tmp_path / "linked")
    (root / "target" / "notes.txt").write_text("not weights")
    assert list(ModelFiles.read(root / "target/model.onnx").weights) == ["model.onnx.data"]
