"""Files of an export, and the checkpoints that they are made of."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
import torch

from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.training.export import MODEL_FILE, export_decoder
from atspeed.training.export_checks import check_parity
from atspeed.training.graph_builder import DATA_FILE
from atspeed.training.pretrained import load_checkpoint
from tests.training.exported import CODES, VOCAB, checkpoint


def test_report_describes_the_exported_model(tmp_path: Path) -> None:
    model = checkpoint("qwen3 biases, tied")
    report = export_decoder(model, tmp_path, code_tokens=CODES, precision="int8")
    assert (report.architecture, report.precision, report.ordered_sums) == ("qwen3", "int8", True)
    assert (report.layers, report.kv_heads, report.head_dim, report.vocab_size) == (2, 2, 16, VOCAB)
    assert report.max_positions == 256
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < report.max_logit_error < 0.5


def test_weights_are_in_a_separate_file(tmp_path: Path) -> None:
    export_decoder(checkpoint(), tmp_path, code_tokens=CODES)
    graph = onnx.load(tmp_path / MODEL_FILE, load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    # Table, norm and head; norms and products of each layer; the frequencies of the rotary embedding.
    assert len(outside) == 3 + 2 * 6 + 1
    assert {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"} == {
        DATA_FILE
    }
    # What stays in the graph are shapes, slices, single numbers and the columns' token ids.
    inside = [tensor for tensor in graph.initializer if tensor not in outside]
    assert all(tensor.data_type == onnx.TensorProto.INT64 or list(tensor.dims) == [1] for tensor in inside)
    (tmp_path / DATA_FILE).unlink()
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Decoder(tmp_path / MODEL_FILE, RuntimeOptions())


def test_a_file_loads_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint()
    export_decoder(model, tmp_path / "model", code_tokens=CODES)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (tmp_path / "model" / MODEL_FILE, Path(os.path.relpath(tmp_path / "model" / MODEL_FILE))):
        assert check_parity(model, path, CODES, "float32") < 1e-4


def test_tied_embeddings_and_narrow_precisions_make_small_files(tmp_path: Path) -> None:
    def size(name: str, precision: Precision) -> int:
        # Wide enough for the padding between tensors not to count.
        model = checkpoint(name, hidden_size=384, intermediate_size=512, initializer_range=0.03)
        export_decoder(model, tmp_path, code_tokens=CODES, precision=precision)
        return (tmp_path / DATA_FILE).stat().st_size

    untied, tied = size("llama", "float32"), size("tied", "float32")
    assert untied - tied == pytest.approx(VOCAB * 384 * 4, abs=4096)
    assert size("tied", "float16") == pytest.approx(tied / 2, rel=0.05)
    assert size("tied", "int8") == pytest.approx(tied / 4, rel=0.1)


def test_loads_a_checkpoint_in_float32(tmp_path: Path) -> None:
    checkpoint("qwen2 tied").bfloat16().save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    assert model.dtype == torch.float32
    assert not model.training
    assert export_decoder(model, tmp_path / "onnx", code_tokens=CODES).max_logit_error < 1e-4
