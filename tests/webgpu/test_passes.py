"""Passes on a device whose memory is not the host's: the same numbers as on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from atspeed.engine.arrays import Float32, KvArray
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.training.export import write_graph
from tests.webgpu.software_device import missing, on_webgpu

CODES = range(40, 72)
PROMPT, NODES = 13, 6

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

# Parents of the tree's nodes, as places among prompt and nodes; a prompt's token sees all before it.
PARENTS = [*range(-1, PROMPT - 1), PROMPT - 1, PROMPT - 1, PROMPT, PROMPT, PROMPT + 1, PROMPT + 4]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Decoder]:
    """One graph on the CPU and on the device."""
    folder = tmp_path_factory.mktemp("graph")
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model: Any = LlamaForCausalLM(config)
    write_graph(model.eval(), folder, CODES, "float32")
    path = folder / "model.onnx"
    with on_webgpu():
        on_device = Decoder(path, RuntimeOptions())
    return Decoder(path, RuntimeOptions()), on_device


def tree() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Tokens, positions and visibility of a prompt with a tree behind it."""
    visible = np.eye(PROMPT + NODES, dtype=bool)
    for node, parent in enumerate(PARENTS):
        if parent >= 0:
            visible[node] |= visible[parent]
    tokens = np.random.default_rng(3).integers(0, 80, PROMPT + NODES)
    return tokens, visible.sum(1) - 1, visible


def passes(decoder: Decoder, ends: Sequence[int]) -> tuple[list[tuple[Float32, ...]], KvArray]:
    """Outputs of passes up to each end, and all keys and values."""
    tokens, positions, visible = tree()
    kv = decoder.empty_kv(len(tokens))
    found, start = [], 0
    for end in ends:
        new = slice(start, end)
        rows = np.arange(end - start)
        found.append(
            decoder.run(tokens[new], positions[new], visible[new, :end], kv[:, :, :start], rows, kv[:, :, new])
        )
        start = end
    return found, kv


def test_a_prompt_and_a_tree_behind_it(decoders: tuple[Decoder, Decoder]) -> None:
    (expected, expected_kv), (found, found_kv) = (passes(decoder, [PROMPT, PROMPT + NODES]) for decoder in decoders)
    for (logits, normalizer), (own_logits, own_normalizer) in zip(expected, found, strict=True):
        np.testing.assert_allclose(own_logits, logits, atol=1e-5)
        np.testing.assert_allclose(own_normalizer, normalizer, atol=1e-5)
    np.testing.assert_allclose(found_kv, expected_kv, atol=1e-5)
