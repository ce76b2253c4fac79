"""Exported int8 files: the same bits in any pass, and what rounded weights and inputs give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from atspeed.engine.arrays import KvArray
from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.training.export import MODEL_FILE, export_decoder
from atspeed.training.int8_graph import quantise_rows, quantise_rows_finely
from atspeed.training.parity import Outputs, RandomTree, checkpoint_outputs, decoder_outputs
from tests.training.exported import CHECKPOINTS, CODES, VOCAB, checkpoint, exported, round_to_8_bits


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


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cuts", [(1,), (7, 8, 31), (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)])
def test_keys_are_the_same_bits_however_a_prompt_is_cut(
    cuts: tuple[int, ...], threads: int, precision: Precision, tmp_path: Path
) -> None:
    """Cached keys and values of one pass are thus those that another pass would compute."""
    export_decoder(checkpoint("qwen3"), tmp_path, code_tokens=CODES, precision=precision)
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
    alone, together = (decoder.empty_kv(27).reshape(decoder.batch_shape(3, 9)) for _ in range(2))
    expected = []
    for row, tree in enumerate(trees):
        expected.append(read(decoder, tree, kv := decoder.empty_kv(9), 0, 9))
        decoder.form.of_tree(alone, row)[:] = kv
    logits, normalizer = decoder.run_batch(
        np.stack([tree.tokens for tree in trees]),
        np.stack([tree.positions for tree in trees]),
        np.stack([tree.visible for tree in trees]),
        np.empty(decoder.batch_shape(3, 0), np.float32),
        np.arange(27),
        together,
    )
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(np.column_stack([logits, normalizer]), np.concatenate(expected))


def read(decoder: Decoder, tree: RandomTree, kv: KvArray, start: int, end: int) -> Outputs:
    """Return the outputs of a pass over these tokens, behind those before them."""
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
