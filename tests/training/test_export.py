"""The exported file computes what its checkpoint computes, for every kind of checkpoint that is not refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from atspeed.engine.arrays import KvArray
from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.training import export
from atspeed.training.export import MODEL_FILE, ExportError, check_parity, export_decoder, load_checkpoint
from atspeed.training.graph_builder import DATA_FILE
from atspeed.training.int8_graph import quantise_rows, quantise_rows_finely
from atspeed.training.parity import Outputs, RandomTree, checkpoint_outputs, decoder_outputs, log_probabilities
from tests.bundles import random_model

VOCAB = 97
CODES = tuple(range(40, 90))
# Weights of the size that training leaves: wide enough to tell right from wrong, narrow enough for 8 bits to be near.
CALM = {"initializer_range": 0.15}
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")

CHECKPOINTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "one head per key": ("llama", {"num_key_value_heads": 4}),
    "one key for all heads": ("llama", {"num_key_value_heads": 1}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("llama", {"head_dim": 20}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    # Its attention_scaling is not 1.
    "yarn rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    # A window that no sequence can reach changes nothing.
    "idle window": ("qwen2", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 0}),
    "qwen3": ("qwen3", {}),
    "qwen3 biases, tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}


def checkpoint(name: str = "llama", **overrides: object) -> PreTrainedModel:
    """A tiny checkpoint whose norms and biases are random too: ones and zeros would hide a missing one."""
    architecture, shape = CHECKPOINTS[name]
    model = random_model(architecture, VOCAB, seed=5, **{**CALM, **shape, **overrides})
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def exported(model: PreTrainedModel, folder: Path, precision: Precision = "float32") -> Decoder:
    export_decoder(model, folder, code_tokens=CODES, precision=precision)
    return Decoder(folder / MODEL_FILE, RuntimeOptions())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_file_computes_what_the_checkpoint_computes(name: str, tmp_path: Path) -> None:
    model = checkpoint(name)
    decoder = exported(model, tmp_path)
    tree = RandomTree.grow(np.random.default_rng(11), VOCAB, prefix=30, nodes=25)
    np.testing.assert_allclose(decoder_outputs(decoder, tree), checkpoint_outputs(model, tree, CODES), atol=5e-5)


# Rounding of every layer's result, and with int8 of its inputs and weights.
@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 0.01), ("int8", 0.5)])
@pytest.mark.parametrize("name", ["biases", "gemma", "qwen2 tied", "qwen3"])
def test_lower_precisions_are_near_the_checkpoint(
    name: str, precision: Precision, tolerance: float, tmp_path: Path
) -> None:
    model = checkpoint(name)
    decoder = exported(model, tmp_path, precision)
    tree = RandomTree.grow(np.random.default_rng(11), VOCAB, prefix=30, nodes=25)
    expected = checkpoint_outputs(model, tree, CODES)
    assert decoder.dtype == ("float16" if precision == "float16" else "float32")
    assert np.ptp(log_probabilities(expected)) > 5
    np.testing.assert_allclose(decoder_outputs(decoder, tree), expected, atol=tolerance)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_int8_computes_what_the_checkpoint_does_with_rounded_weights_and_inputs(name: str, tmp_path: Path) -> None:
    """The oracle rounds around the checkpoint's own layers and computes in float32, so a step is tipped now and then."""
    model = checkpoint(name)
    decoder = exported(model, tmp_path, "int8")
    round_to_8_bits(model)
    errors = []
    for seed in range(3):
        tree = RandomTree.grow(np.random.default_rng(seed), VOCAB, prefix=30, nodes=25)
        errors.append(np.abs(decoder_outputs(decoder, tree) - checkpoint_outputs(model, tree, CODES)))
    assert min(error.max() for error in errors) < 3e-4  # a step of 16 bits before the head
    assert max(error.max() for error in errors) < 0.1


def round_to_8_bits(model: PreTrainedModel) -> None:
    """Weights of every matrix to 7 bits by row, inputs of every product to 8 bits by token, in place; of table and head to 14
    and 16.
    """

    def in_steps(values: torch.Tensor, steps: int) -> torch.Tensor:
        step = values.abs().amax(-1, keepdim=True).clamp_min(1e-30) / steps
        return (values / step).round() * step

    head: Any = model.lm_head
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, torch.nn.Embedding) or (part is head and not model.config.tie_word_embeddings):
                part.weight.copy_(in_steps(part.weight, 63 * 126))
            elif isinstance(part, torch.nn.Linear) and part is not head:
                part.weight.copy_(in_steps(part.weight, 63))
                part.register_forward_pre_hook(lambda _, inputs: in_steps(inputs[0], 127))
    head.register_forward_pre_hook(lambda _, inputs: in_steps(inputs[0], 127 * 254))


# The last bits only; float16 keeps 11 bits of every layer's result, and another order of adding may tip the last one.
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float16", 1e-2), ("int8", 0)])
@pytest.mark.parametrize("name", ["one head per key", "biases", "qwen3"])
def test_node_result_is_independent_of_other_tokens(
    name: str, precision: Precision, tolerance: float, tmp_path: Path
) -> None:
    """Plan-invariance: dynamic quantisation broke it, its scale being taken over all tokens of the pass."""
    decoder = exported(checkpoint(name), tmp_path, precision)
    for seed in range(3):
        tree = RandomTree.grow(np.random.default_rng(seed), VOCAB, prefix=20, nodes=40)
        together = log_probabilities(decoder_outputs(decoder, tree))
        for node in range(tree.prefix, len(tree.tokens)):
            result = log_probabilities(decoder_outputs(decoder, tree.alone(node)))[-1]
            np.testing.assert_allclose(result, together[node - tree.prefix + 1], atol=tolerance, rtol=0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cuts", [(1,), (7, 8, 31), (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)])
def test_int8_keys_are_the_same_bits_however_a_prompt_is_cut(
    cuts: tuple[int, ...], threads: int, tmp_path: Path
) -> None:
    """So what a cache keeps of one pass is what another would have computed."""
    export_decoder(checkpoint("qwen3"), tmp_path, code_tokens=CODES, precision="int8")
    decoder = Decoder(tmp_path / MODEL_FILE, RuntimeOptions(intra_op_threads=threads))
    chain = RandomTree.grow(np.random.default_rng(5), VOCAB, prefix=40, nodes=0)
    whole, parts = decoder.empty_kv(40), decoder.empty_kv(40)
    expected = read(decoder, chain, whole, 0, 40)
    found = [read(decoder, chain, parts, start, end) for start, end in zip((0, *cuts), (*cuts, 40), strict=True)]
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_int8_trees_of_a_batch_are_the_same_bits_as_alone(tmp_path: Path) -> None:
    decoder = exported(checkpoint("one head per key"), tmp_path, "int8")
    trees = [RandomTree.grow(np.random.default_rng(seed), VOCAB, prefix=9, nodes=0) for seed in range(3)]
    alone, together = (
        decoder.empty_kv(27).reshape(decoder.layers, 2, 3, 9, decoder.kv_heads, decoder.head_dim) for _ in range(2)
    )
    expected = [read(decoder, tree, alone[:, :, row], 0, 9) for row, tree in enumerate(trees)]
    logits, normalizer = decoder.run_batch(
        np.stack([tree.tokens for tree in trees]),
        np.stack([tree.positions for tree in trees]),
        np.stack([tree.visible for tree in trees]),
        together[:, :, :, :0],
        np.arange(27),
        together,
    )
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(np.column_stack([logits, normalizer]), np.concatenate(expected))


def read(decoder: Decoder, tree: RandomTree, kv: KvArray, start: int, end: int) -> Outputs:
    """A pass over these tokens, behind those before them; what it says of all of them."""
    logits, normalizer = decoder.run(
        tree.tokens[start:end],
        tree.positions[start:end],
        tree.visible[start:end, :end],
        kv[:, :, :start],
        np.arange(end - start),
        kv[:, :, start:end],
    )
    return np.column_stack([logits, normalizer])


def test_a_token_of_zeros_stays_one_in_int8(tmp_path: Path) -> None:
    """Its scale is 0, and nothing is divided by that to a result."""
    model = checkpoint()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = 0
    decoder = exported(model, tmp_path, "int8")
    tree = RandomTree(1, np.array([3]), np.array([0]), np.array([[True]]))
    kv = decoder.empty_kv(1)
    outputs = read(decoder, tree, kv, 0, 1)
    assert (kv == 0).all()
    assert (outputs[:, :-1] == 0).all()
    assert outputs[0, -1] == pytest.approx(np.log(VOCAB))


@pytest.mark.parametrize("codes", [CODES, (7, 3, 50, 12), (96,)])
def test_code_columns_come_in_the_order_given(codes: Sequence[int], tmp_path: Path) -> None:
    model = checkpoint()
    export_decoder(model, tmp_path, code_tokens=codes)
    tree = RandomTree.grow(np.random.default_rng(0), VOCAB)
    found = decoder_outputs(Decoder(tmp_path / MODEL_FILE, RuntimeOptions()), tree)
    np.testing.assert_allclose(found, checkpoint_outputs(model, tree, codes), atol=5e-5)


def test_the_normalizer_survives_large_logits(tmp_path: Path) -> None:
    """exp() of a float32 above 88 is infinite: the log-sum-exp must take the largest logit out first."""
    model = checkpoint()
    with torch.no_grad():
        model.lm_head.weight.mul_(500)
    decoder = exported(model, tmp_path)
    tree = RandomTree.grow(np.random.default_rng(0), VOCAB)
    expected = checkpoint_outputs(model, tree, CODES)
    assert expected[:, -1].max() > 200
    np.testing.assert_allclose(decoder_outputs(decoder, tree), expected, rtol=1e-4, atol=0.02)


def test_report_describes_the_exported_model(tmp_path: Path) -> None:
    model = checkpoint("qwen3 biases, tied")
    report = export_decoder(model, tmp_path, code_tokens=CODES, precision="int8")
    assert (report.architecture, report.precision) == ("qwen3", "int8")
    assert (report.layers, report.kv_heads, report.head_dim, report.vocab_size) == (2, 2, 16, VOCAB)
    assert report.max_positions == 256
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < report.max_logit_error < 0.5


def test_weights_are_in_a_separate_file(tmp_path: Path) -> None:
    export_decoder(checkpoint(), tmp_path, code_tokens=CODES)
    graph = onnx.load(tmp_path / MODEL_FILE, load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert len(outside) == 3 + 2 * 6 + 1  # table, norm and head; of each layer norms and products; frequencies
    assert {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"} == {
        DATA_FILE
    }
    # What stays in the graph are shapes, slices and the columns' token ids.
    assert all(tensor.data_type == onnx.TensorProto.INT64 for tensor in graph.initializer if tensor not in outside)
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


def test_quantised_rows_are_within_half_a_step() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 7)[:, None]
    weight[3] = 0
    codes, scale = quantise_rows(weight)
    assert codes.dtype == torch.int8
    scale = scale[:, None]
    assert codes.abs().max() == 63
    assert ((codes * scale - weight).abs() <= 0.5001 * scale).all()
    codes, scale = quantise_rows_finely(weight)
    fine = (codes * scale[:, None]).view(2, 7, 33).sum(0)
    assert codes.abs().max() == 63
    assert ((fine - weight).abs() <= 0.501 * scale[7:, None] + 1e-6 * weight.abs()).all()


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


def test_loads_a_checkpoint_in_float32(tmp_path: Path) -> None:
    checkpoint("qwen2 tied").bfloat16().save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    assert model.dtype == torch.float32
    assert not model.training
    assert export_decoder(model, tmp_path / "onnx", code_tokens=CODES).max_logit_error < 1e-4


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
