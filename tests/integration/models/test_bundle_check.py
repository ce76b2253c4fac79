"""A token whose pass is not finite is found, however rare it is: by the export and by `atspeed bundle verify`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from atspeed.cli.main import app
from atspeed.engine.bundle.manifest import Precision, Role, fingerprint, hash_files, write_manifest
from atspeed.engine.errors import BundleError
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.training import export
from atspeed.training.errors import ExportError
from atspeed.training.export import export_decoder
from tests.bundles import BOS, EOH, SPECIALS, TestBundle, random_model, write_bundle
from tests.catalogues import random_catalogue

SIZES = (256, 256, 256)
VOCAB = SPECIALS + sum(SIZES)
RARE = SPECIALS + 200  # a code of level 0 that no random tree of the parity check asks for
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
Break = Callable[[Any], object]

# What is wrong with a model, and what is said of it.
FAULTS: dict[str, tuple[Break, str]] = {
    "nan in a code's embedding": (
        lambda model: model.model.embed_tokens.weight[RARE].fill_(torch.nan),
        rf"token {RARE} \(code column 200\): nan or inf in its pass",
    ),
    "one inf in a code's embedding": (
        lambda model: model.model.embed_tokens.weight[VOCAB - 1, 5].fill_(torch.inf),
        rf"token {VOCAB - 1} \(code column 767\): nan or inf",
    ),
    "nan in the first code's embedding": (
        lambda model: model.model.embed_tokens.weight[SPECIALS, 0].fill_(torch.nan),
        rf"token {SPECIALS} \(code column 0\): nan or inf in its pass",
    ),
    "nan in a code's row of the head": (
        lambda model: model.lm_head.weight[RARE, 3].fill_(torch.nan),
        rf"token {RARE} \(code column 200\): its logit is nan",
    ),
    "inf in a code's row of the head": (
        lambda model: model.lm_head.weight[RARE].fill_(torch.inf),
        rf"token {RARE} \(code column 200\): its logit is",
    ),
    "nan in a row of the head that is no code's": (
        lambda model: model.lm_head.weight[0, 0].fill_(torch.nan),
        "log_normalizer after token",
    ),
    "nan in the last norm": (
        lambda model: model.model.norm.weight[1].fill_(torch.nan),
        "the shared weights are at fault",
    ),
    "nan in a layer's norm": (
        lambda model: model.model.layers[1].input_layernorm.weight[1].fill_(torch.nan),
        "the shared weights are at fault",
    ),
    "inf in a product's weight": (
        lambda model: model.model.layers[0].mlp.up_proj.weight[2, 2].fill_(torch.inf),
        "the shared weights are at fault|nan or inf",
    ),
}


def broken(fault: Break) -> PreTrainedModel:
    model = random_model("llama", VOCAB, seed=0, tie_word_embeddings=False)
    with torch.no_grad():
        fault(model)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    """771 tokens in each of its models."""
    return write_bundle(tmp_path_factory.mktemp("good"), random_catalogue(400, SIZES, seed=1))


def write_broken(good: TestBundle, root: Path, role: Role, fault: Break, precision: Precision = "float32") -> Path:
    """The bundle with a broken model in a role, its hashes in order, as an exporter without checks would have left it."""
    shutil.copytree(good.root, root)
    shutil.rmtree(root / role)
    (root / role).mkdir()
    manifest = good.bundle.manifest
    export.write_graph(broken(fault), root / role, manifest.models[role].code_tokens, precision)
    files = hash_files(root)
    update = {"fingerprint": fingerprint(files, role), "precision": precision}
    entry = manifest.models[role].model_copy(update=update)
    write_manifest(root, manifest.model_copy(update={role: entry, "files": files}))
    return root


def test_a_good_bundle_passes(good: TestBundle) -> None:
    result = CliRunner().invoke(app, ["bundle", "verify", str(good.root)])
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("name", FAULTS)
def test_verify_refuses_a_model_that_computes_no_numbers(
    good: TestBundle, name: str, role: Role, tmp_path: Path
) -> None:
    fault, said = FAULTS[name]
    root = write_broken(good, tmp_path / "bundle", role, fault)
    with pytest.raises(BundleError, match=rf"{role}/model\.onnx: .*({said})"):
        verify_bundle(root)
    result = CliRunner().invoke(app, ["bundle", "verify", str(root)])
    assert result.exit_code == 1
    assert f"{role}/model.onnx: " in result.stderr


@pytest.mark.parametrize("token", [BOS, EOH])
def test_verify_refuses_a_prompts_token_that_computes_no_numbers(good: TestBundle, token: int, tmp_path: Path) -> None:
    """It stands in every request."""
    root = write_broken(
        good,
        tmp_path / "bundle",
        "target",
        lambda model: model.model.embed_tokens.weight[token].fill_(torch.nan),
    )
    with pytest.raises(BundleError, match=rf"target/model\.onnx: token {token}: nan or inf in its pass"):
        verify_bundle(root)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAULTS)
def test_export_refuses_a_model_that_computes_no_numbers(name: str, precision: Precision, tmp_path: Path) -> None:
    """In 8 bits too, where rounding makes numbers of what all tokens share: there the checkpoint itself gives none."""
    fault, _ = FAULTS[name]
    codes = range(SPECIALS, VOCAB)
    with pytest.raises(ExportError, match=r"model\.onnx: (token \d+|log_normalizer|differs .* by nan)"):
        export_decoder(broken(fault), tmp_path, code_tokens=codes, precision=precision)
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_weight_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    """65504 is its largest number; in float32 the same row is one like any other."""
    model = broken(lambda model: model.model.embed_tokens.weight[RARE].fill_(1e6))
    codes = range(SPECIALS, VOCAB)
    export_decoder(model, tmp_path / "float32", code_tokens=codes)
    with pytest.raises(ExportError, match=rf"token {RARE} \(code column 200\): nan or inf in its pass"):
        export_decoder(model, tmp_path / "float16", code_tokens=codes, precision="float16")


def test_export_command_names_the_token(tmp_path: Path) -> None:
    broken(FAULTS["nan in a code's embedding"][0]).save_pretrained(tmp_path / "checkpoint")
    asked = [str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--code-tokens", f"{SPECIALS}:{VOCAB - 1}"]
    result = CliRunner().invoke(app, ["export", *asked])
    assert result.exit_code == 1
    assert f"token {RARE} (code column 200): nan or inf in its pass" in result.stderr
