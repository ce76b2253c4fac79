"""Exported files compute what their checkpoints compute, for every kind of checkpoint that is not refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.training.export import MODEL_FILE, export_decoder
from atspeed.training.parity import RandomTree, checkpoint_outputs, decoder_outputs, log_probabilities
from tests.training.exported import CHECKPOINTS, CODES, VOCAB, checkpoint, exported


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_file_computes_what_the_checkpoint_computes(name: str, tmp_path: Path) -> None:
    model = checkpoint(name)
    decoder = exported(model, tmp_path)
    tree = RandomTree.grow(np.random.default_rng(11), VOCAB, prefix=30, nodes=25)
    np.testing.assert_allclose(decoder_outputs(decoder, tree), checkpoint_outputs(model, tree, CODES), atol=5e-5)


# Rounding of every layer's result, and with int8 of its inputs and weights.
@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 0.01), ("int8", 0.5)])
@pytest.mark.parametrize("name", ["biases", "gemma", "phi3", "qwen2 tied", "qwen3"])
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


# float16 keeps 11 bits of every layer's result, and another order of adding may tip the last one.
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 0), ("float16", 1e-2), ("int8", 0)])
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
