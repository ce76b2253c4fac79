"""The two files of a T5 compute what their checkpoint computes, and what they cannot compute is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5EncoderModel

from atspeed.engine.errors import BundleError
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.encoder_decoder import ENCODER_FILE, EncoderDecoder
from atspeed.training import export
from atspeed.training.errors import ExportError
from atspeed.training.export import MODEL_FILE, export_decoder
from atspeed.training.parity import RandomTree, checkpoint_outputs, decoder_outputs, log_probabilities
from atspeed.training.pretrained import load_checkpoint
from atspeed.training.t5_graph import ENCODER_DATA_FILE
from tests.bundles import random_t5, write_bundle
from tests.catalogues import random_catalogue
from tests.training.exported import round_to_8_bits

VOCAB = 97
CODES = tuple(range(40, 90))
START = 7

CHECKPOINTS: dict[str, dict[str, object]] = {
    "relu": {},
    "gated-gelu": {"feed_forward_proj": "gated-gelu"},
    "gated-relu": {"feed_forward_proj": "gated-relu"},
    "unscaled head": {"tie_word_embeddings": False},
    "deeper decoder": {"num_decoder_layers": 3},
    "deeper encoder": {"num_layers": 3, "num_decoder_layers": 1},
    "heads that do not add up to the model's width": {"num_heads": 6, "d_kv": 8},
    "few buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
}


def checkpoint(name: str = "relu", **overrides: object) -> PreTrainedModel:
    return random_t5(VOCAB, 5, **{"decoder_start_token_id": START, **CHECKPOINTS[name], **overrides})


def exported(model: PreTrainedModel, folder: Path) -> EncoderDecoder:
    export_decoder(model, folder, code_tokens=CODES)
    return EncoderDecoder(folder / MODEL_FILE, RuntimeOptions())


def tree_of(seed: int, *, prefix: int = 20, nodes: int = 25) -> RandomTree:
    tree = RandomTree.grow(np.random.default_rng(seed), VOCAB, prefix=prefix, nodes=nodes)
    tree.tokens[prefix - 1] = START
    return tree


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("prefix", [2, 20, 60])  # the decoder's first token included; 60 is beyond the longest distance
def test_the_files_compute_what_the_checkpoint_computes(name: str, prefix: int, tmp_path: Path) -> None:
    model = checkpoint(name)
    decoder, tree = exported(model, tmp_path), tree_of(11, prefix=prefix)
    np.testing.assert_allclose(decoder_outputs(decoder, tree), checkpoint_outputs(model, tree, CODES), atol=5e-5)


def test_paths_may_be_longer_than_the_longest_distance(tmp_path: Path) -> None:
    model = checkpoint()
    decoder, tree = exported(model, tmp_path), tree_of(3, prefix=5, nodes=0)
    chain = RandomTree.grow(np.random.default_rng(4), VOCAB, prefix=45, nodes=0)
    # Of 45 tokens the encoder reads 4; 40 follow the decoder's first one.
    tree = RandomTree(5, np.append(tree.tokens, chain.tokens[5:]), chain.positions, chain.visible)
    np.testing.assert_allclose(decoder_outputs(decoder, tree), checkpoint_outputs(model, tree, CODES), atol=5e-5)


@pytest.mark.parametrize("name", ["relu", "gated-gelu"])
def test_node_result_is_independent_of_other_tokens(name: str, tmp_path: Path) -> None:
    decoder = exported(checkpoint(name), tmp_path)
    tree = tree_of(2, nodes=40)
    together = log_probabilities(decoder_outputs(decoder, tree))
    for node in range(tree.prefix, len(tree.tokens)):
        result = log_probabilities(decoder_outputs(decoder, tree.alone(node)))[-1]
        np.testing.assert_array_equal(result, together[node - tree.prefix + 1])


def test_trees_of_a_batch_are_as_alone(tmp_path: Path) -> None:
    """Trees of other prompt lengths and at other passes: the encoder rows of each tree are found in its own mask."""
    decoder = exported(checkpoint(), tmp_path)
    trees = [tree_of(seed, prefix=prefix, nodes=9) for seed, prefix in enumerate((3, 14, 25))]
    deepest, count = max(tree.prefix for tree in trees), 9
    past = np.zeros((decoder.layers, 2, len(trees), deepest, decoder.kv_heads, decoder.head_dim), dtype=np.float32)
    visible = np.zeros((len(trees), count, deepest + count), dtype=bool)
    expected = []
    for row, tree in enumerate(trees):
        expected.append(decoder_outputs(decoder, tree)[1:])
        kv, encoded = decoder.empty_kv(tree.prefix), tree.prefix - 1
        decoder.encode(tree.tokens[:encoded], kv[:, :, :encoded])
        start = np.array([START])
        mask = np.ones((1, tree.prefix), dtype=bool)
        decoder.run(start, np.array([0]), mask, kv[:, :, :encoded], np.array([0]), kv[:, :, encoded:])
        past[:, :, row, : tree.prefix] = kv
        visible[row, :, : tree.prefix] = tree.visible[tree.prefix :, : tree.prefix]
        visible[row, :, deepest:] = tree.visible[tree.prefix :, tree.prefix :]
    logits, normalizer = decoder.run_batch(
        np.stack([tree.tokens[tree.prefix :] for tree in trees]),
        np.stack([tree.positions[tree.prefix :] - (tree.prefix - 1) for tree in trees]),
        visible,
        past,
        np.arange(len(trees) * count),
        np.empty((decoder.layers, 2, len(trees), count, decoder.kv_heads, decoder.head_dim), dtype=np.float32),
    )
    np.testing.assert_array_equal(np.column_stack([logits, normalizer]), np.concatenate(expected))


def test_report_describes_the_exported_model(tmp_path: Path) -> None:
    model = checkpoint("deeper decoder")
    report = export_decoder(model, tmp_path, code_tokens=CODES)
    assert (report.architecture, report.precision, report.decoder_start) == ("t5", "float32", START)
    assert (report.layers, report.kv_heads, report.head_dim, report.vocab_size) == (3, 4, 16, VOCAB)
    assert report.max_positions == 512
    assert export_decoder(checkpoint(n_positions=64), tmp_path / "b", code_tokens=CODES).max_positions == 64
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        ENCODER_FILE,
        ENCODER_DATA_FILE,
        MODEL_FILE,
        f"{MODEL_FILE}.data",
    ]
    graph = onnx.load(tmp_path / ENCODER_FILE, load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert {one.value for tensor in outside for one in tensor.external_data if one.key == "location"} == {
        ENCODER_DATA_FILE
    }


def test_a_saved_checkpoint_is_loaded_and_exported(tmp_path: Path) -> None:
    checkpoint("gated-gelu", tie_word_embeddings=False).save_pretrained(tmp_path / "saved")
    model = load_checkpoint(tmp_path / "saved")
    assert export_decoder(model, tmp_path / "onnx", code_tokens=CODES).max_logit_error < 1e-4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_float16_is_close_to_the_checkpoint(name: str, tmp_path: Path) -> None:
    model = checkpoint(name)
    report = export_decoder(model, tmp_path, code_tokens=CODES, precision="float16")
    decoder, tree = EncoderDecoder(tmp_path / MODEL_FILE, RuntimeOptions()), tree_of(11)
    assert report.precision == "float16"
    assert decoder.dtype == np.dtype(np.float16)
    expected = checkpoint_outputs(model, tree, CODES)
    np.testing.assert_allclose(decoder_outputs(decoder, tree), expected, atol=2e-2 * np.abs(expected).max())


def test_float16_that_overflows_is_refused(tmp_path: Path) -> None:
    """Hidden states of some T5 are beyond 65,504."""
    model: Any = checkpoint()
    with torch.no_grad():
        model.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1e6)
    with pytest.raises(ExportError, match="nan or inf in the pass"):
        export_decoder(model, tmp_path, code_tokens=CODES, precision="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["relu", "gated-gelu"])
def test_int8_computes_with_rounded_weights_and_is_independent_of_other_tokens(name: str, tmp_path: Path) -> None:
    """The oracle rounds around the checkpoint's own layers and computes in float32, so a step is tipped now and then."""
    model = checkpoint(name)
    export_decoder(model, tmp_path, code_tokens=CODES, precision="int8")
    decoder, trees = EncoderDecoder(tmp_path / MODEL_FILE, RuntimeOptions()), [tree_of(seed) for seed in range(3)]
    found = [decoder_outputs(decoder, tree) for tree in trees]
    in_float = [checkpoint_outputs(model, tree, CODES) for tree in trees]
    round_to_8_bits(model)
    errors = [
        np.abs(actual - checkpoint_outputs(model, tree, CODES)).max() for actual, tree in zip(found, trees, strict=True)
    ]
    assert min(errors) < 3e-4
    assert max(errors) < 0.1
    assert all(np.abs(actual - other).max() > 1e-2 for actual, other in zip(found, in_float, strict=True))  # it rounds
    tree = trees[0]
    for node in range(tree.prefix, len(tree.tokens)):
        np.testing.assert_array_equal(decoder_outputs(decoder, tree.alone(node))[-1], found[0][node - tree.prefix + 1])


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.feed_forward_proj: 'silu', supported are relu, gelu_new"):
        export_decoder(checkpoint(feed_forward_proj="gated-silu"), tmp_path, code_tokens=CODES)
    with pytest.raises(ExportError, match=r"config\.decoder_start_token_id: None"):
        export_decoder(checkpoint(decoder_start_token_id=None), tmp_path, code_tokens=CODES)
    with pytest.raises(ExportError, match=r"config\.decoder_start_token_id: 97"):
        export_decoder(checkpoint(decoder_start_token_id=VOCAB), tmp_path, code_tokens=CODES)
    encoder: Any = T5EncoderModel(T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    with pytest.raises(ExportError, match=r"config\.is_encoder_decoder: false"):
        export_decoder(encoder.train(False), tmp_path, code_tokens=CODES)


Change = Callable[[Any], object]
CHANGES: dict[str, Change] = {
    "cross-attention": lambda model: model.decoder.block[1].layer[1].EncDecAttention.v.weight.mul_(1.1),
    "encoder": lambda model: model.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1.1),
    "position bias of the encoder": lambda model: (
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight[3].add_(0.5)
    ),
    "position bias of the decoder": lambda model: (
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight[1].add_(0.5)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_weight_fails_the_export(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either file; what the parity check refuses leaves no file that could be served."""
    write_graph, other = export.write_graph, checkpoint()
    with torch.no_grad():
        CHANGES[name](other)
    monkeypatch.setattr(export, "write_graph", lambda _, *arguments: write_graph(other, *arguments))
    with pytest.raises(ExportError, match="differs from its checkpoint"):
        export_decoder(checkpoint(), tmp_path, code_tokens=CODES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda model: model.shared.weight[60].fill_(torch.nan),
            r"token 60 \(code column 20\): nan or inf in its pass",
        ),
        (lambda model: model.encoder.final_layer_norm.weight[1].fill_(torch.nan), "the shared weights are at fault"),
        (lambda model: model.decoder.final_layer_norm.weight[1].fill_(torch.nan), "the shared weights are at fault"),
    ],
)
def test_a_token_whose_pass_is_not_finite_is_named(change: Change, said: str, tmp_path: Path) -> None:
    model = checkpoint()
    with torch.no_grad():
        change(model)
    with pytest.raises(ExportError, match=said):
        export_decoder(model, tmp_path, code_tokens=CODES)


def test_every_file_of_a_bundle_is_verified(tmp_path: Path) -> None:
    made = write_bundle(tmp_path, random_catalogue(20, (4, 4), seed=1), architecture="t5")
    verify_bundle(tmp_path)
    encoder = made.bundle.manifest.target.encoder
    assert encoder is not None
    assert (encoder.path, encoder.decoder_start) == (f"target/{ENCODER_FILE}", 0)
    with (tmp_path / "target" / ENCODER_DATA_FILE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(BundleError, match=r"encoder\.onnx\.data"):
        verify_bundle(tmp_path)
