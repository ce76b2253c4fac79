"""Exports that fail: wrong weights, and checkpoints that the graph cannot express."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from atspeed.engine.bundle.manifest import Precision
from atspeed.training import export
from atspeed.training.errors import ExportError
from atspeed.training.export import MODEL_FILE, export_decoder
from atspeed.training.export_checks import check_parity
from atspeed.training.pretrained import load_checkpoint
from tests.training.exported import CODES, PRECISIONS, VOCAB, checkpoint


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_wrong_weight_fails_the_export(precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity check is part of the export: what it refuses leaves no file that could be served."""
    write_graph = export.write_graph

    def write_another_model(model: PreTrainedModel, *arguments: object) -> None:
        write_graph(checkpoint(rms_norm_eps=0.3), *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "write_graph", write_another_model)
    with pytest.raises(ExportError, match="differs from its checkpoint"):
        export_decoder(checkpoint(), tmp_path, code_tokens=CODES, precision=precision)
    assert not list(tmp_path.iterdir())


def test_one_wrong_weight_among_thousands_is_found(tmp_path: Path) -> None:
    model = checkpoint()
    export_decoder(model, tmp_path, code_tokens=CODES)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 0.5
    with pytest.raises(ExportError, match="differs from its checkpoint"):
        check_parity(model, tmp_path / MODEL_FILE, CODES, "float32")


def test_a_weight_that_is_not_a_number_fails_the_export(tmp_path: Path) -> None:
    model = checkpoint()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ExportError, match="nan"):
        export_decoder(model, tmp_path, code_tokens=CODES)


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ({"hidden_act": "gelu"}, "config.hidden_act"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "config.rope_parameters.rope_type",
        ),
    ],
)
def test_refuses_a_llama_that_the_graph_cannot_express(shape: dict[str, object], field: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=field):
        export_decoder(checkpoint("llama", **shape), tmp_path, code_tokens=CODES)


def test_refuses_an_active_sliding_window(tmp_path: Path) -> None:
    model = checkpoint("idle window", sliding_window=255)
    with pytest.raises(ExportError, match=r"config\.sliding_window: 255"):
        export_decoder(model, tmp_path, code_tokens=CODES)


def test_refuses_a_mistral_whose_window_slides(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.sliding_window: 255"):
        export_decoder(checkpoint("mistral", sliding_window=255), tmp_path, code_tokens=CODES)


def test_refuses_a_phi_that_rotates_a_part_of_each_head(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    with pytest.raises(ExportError, match=r"config\.rope_parameters\.partial_rotary_factor: rotates a part"):
        export_decoder(checkpoint("phi3", rope_parameters=rope), tmp_path, code_tokens=CODES)


def test_refuses_other_architectures(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=VOCAB))
    with pytest.raises(ExportError, match=r"config\.model_type: 'gpt2'"):
        export_decoder(model.train(False), tmp_path, code_tokens=CODES)


def test_refuses_a_model_in_training_or_in_another_dtype(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="training=True"):
        export_decoder(checkpoint().train(), tmp_path, code_tokens=CODES)
    with pytest.raises(ExportError, match=r"torch\.bfloat16"):
        export_decoder(checkpoint().bfloat16(), tmp_path, code_tokens=CODES)


@pytest.mark.parametrize("codes", [(), (-1, 3), (5, VOCAB)])
def test_refuses_code_tokens_that_are_not_columns(codes: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="code_tokens"):
        export_decoder(checkpoint(), tmp_path, code_tokens=codes)


def test_load_refuses_an_incomplete_checkpoint(tmp_path: Path) -> None:
    """transformers would fill the missing weights with random numbers."""
    with pytest.raises(ExportError, match=r"config\.json"):
        load_checkpoint(tmp_path)
    model = checkpoint()
    weights = {name: weight for name, weight in model.state_dict().items() if "o_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ExportError, match=r"missing.*o_proj"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ExportError, match="cannot load"):
        load_checkpoint(tmp_path)
