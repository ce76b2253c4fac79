"""Device graphs in bundles: written, carried along and verified; a bundle without one is for the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from atspeed.cli.main import app
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.engine.bundle.manifest import (
    MANIFEST,
    ROLES,
    Precision,
    fingerprint,
    hash_files,
    read_manifest,
    write_manifest,
)
from atspeed.engine.errors import BundleError
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.device_graph import DEVICE_FILE
from atspeed.engine.model.loading import device_graph_files, load_decoder
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.export_checks import TOLERANCE
from tests.bundles import TestBundle, write_bundle
from tests.catalogues import random_catalogue


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    catalogue = random_catalogue(20, (4, 4), seed=0)
    return write_bundle(tmp_path_factory.mktemp("device") / "bundle", catalogue, rule=ScoringRule.TRIE)


def rehashed(root: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Bundle:
    """The bundle with its hashes in order, after a change of its manifest."""
    written = json.loads((root / MANIFEST).read_text())
    change(written)
    written["files"] = hash_files(root)
    for role in ROLES:
        written[role]["fingerprint"] = fingerprint(written["files"], role)
    (root / MANIFEST).write_text(json.dumps(written))
    return Bundle(root)


@pytest.mark.parametrize(
    ("rule", "head"), [(ScoringRule.VOCAB, "vocab"), (ScoringRule.TRIE, "codes"), (ScoringRule.CODES, "codes")]
)
def test_the_scoring_rule_decides_on_the_head(rule: ScoringRule, head: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, random_catalogue(20, (4, 4), seed=0), rule=rule).bundle
    for role in ROLES:
        entry = bundle.model(role).device_graph
        assert entry
        assert (entry.path, entry.head) == (f"{role}/{DEVICE_FILE}", head)
        assert device_graph_files(bundle, role, verified=True).path == bundle.root / role / DEVICE_FILE


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_bundle_of_any_format_is_verified_and_loads_on_the_cpu(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCE, precision, 1.0)  # the random models are too wide for 16 bits
    bundle = write_bundle(tmp_path, random_catalogue(20, (4, 4), seed=0), precision=precision).bundle
    result = CliRunner().invoke(app, ["bundle", "verify", str(bundle.root)])
    assert result.exit_code == 0, result.stderr
    decoder = load_decoder(bundle, "target", RuntimeOptions())
    assert decoder.dtype == ("float16" if precision == "float16" else "float32")


def test_a_catalogue_update_carries_the_device_graphs(made: TestBundle, tmp_path: Path) -> None:
    updated = update_catalogue(made.bundle, tmp_path / "updated", {}, [made.bundle.catalogue().id_of(0)])
    verify_bundle(updated.root)
    for role in ROLES:
        assert device_graph_files(updated, role).graph == device_graph_files(made.bundle, role).graph


def test_a_bundle_without_device_graphs_is_for_the_cpu(made: TestBundle, tmp_path: Path) -> None:
    """A bundle of an earlier version keeps its version, and only a device asks for what it lacks."""
    root = shutil.copytree(made.root, tmp_path / "old")
    for role in ROLES:
        (root / role / DEVICE_FILE).unlink()
    bundle = rehashed(root, lambda written: [written[role].pop("device_graph") for role in ROLES])
    verify_bundle(root)
    write_manifest(root, bundle.manifest)
    assert "device_graph" not in (root / MANIFEST).read_text()
    assert read_manifest(root).version == bundle.manifest.version
    assert load_decoder(bundle, "target", RuntimeOptions()).columns == 8
    with pytest.raises(BundleError, match=r"target\.device_graph: the bundle has none; export the model again"):
        device_graph_files(bundle, "target")


@pytest.mark.parametrize(("precision", "architecture"), [("int8", "llama"), ("float32", "t5")])
def test_int8_and_t5_are_for_the_cpu(precision: Precision, architecture: str, tmp_path: Path) -> None:
    catalogue = random_catalogue(20, (4, 4), seed=0)
    bundle = write_bundle(tmp_path, catalogue, precision=precision, architecture=architecture).bundle
    said = rf"target\.device_graph: the bundle has none; a {precision} {architecture} runs with kv_paged never"
    with pytest.raises(BundleError, match=said):
        device_graph_files(bundle, "target")


def test_a_head_of_codes_does_not_do_for_the_vocabulary(made: TestBundle, tmp_path: Path) -> None:
    root = shutil.copytree(made.root, tmp_path / "other")
    bundle = rehashed(root, lambda written: written.update(scoring_rule="vocab"))
    said = r"target\.device_graph\.head: codes, but scoring_rule vocab sums over the vocabulary"
    with pytest.raises(BundleError, match=said):
        device_graph_files(bundle, "target")
    with pytest.raises(BundleError, match=said):
        verify_bundle(root)


def without_an_input(graph: onnx.GraphProto) -> None:
    """Write a graph whose prefix lengths are a constant."""
    [index] = [number for number, value in enumerate(graph.input) if value.name == "prefix_lengths"]
    del graph.input[index]
    graph.initializer.append(onnx.helper.make_tensor("prefix_lengths", onnx.TensorProto.INT64, [1, 1], [1]))


def with_scores_of_another_name(graph: onnx.GraphProto) -> None:
    [node] = [node for node in graph.node if node.output[0] == "code_logits"]
    node.output[0] = graph.output[0].name = "scores"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without_an_input, "target/device.onnx: input prefix_lengths: missing"),
        (with_scores_of_another_name, "target/device.onnx: output (code_logits: missing|scores: not one)"),
    ],
)
def test_verify_refuses_a_device_graph_that_breaks_the_contract(
    made: TestBundle, edit: Callable[[onnx.GraphProto], None], said: str, tmp_path: Path
) -> None:
    root = shutil.copytree(made.root, tmp_path / "broken")
    model = onnx.load(root / "target" / DEVICE_FILE, load_external_data=False)
    edit(model.graph)
    (root / "target" / DEVICE_FILE).write_bytes(model.SerializeToString())
    rehashed(root)
    with pytest.raises(BundleError, match=said):
        verify_bundle(root)
    result = CliRunner().invoke(app, ["bundle", "verify", str(root)])
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1


def test_verify_finds_a_changed_device_graph(made: TestBundle, tmp_path: Path) -> None:
    root = shutil.copytree(made.root, tmp_path / "changed")
    with (root / "draft" / DEVICE_FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=f"draft/{DEVICE_FILE}"):
        verify_bundle(root)


def test_a_device_graph_elsewhere_is_refused(made: TestBundle, tmp_path: Path) -> None:
    root = shutil.copytree(made.root, tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"device_graph\.path: not in the folder of target/model\.onnx"):
        rehashed(root, lambda written: written["target"]["device_graph"].update(path="draft/device.onnx"))
