"""Shared passes change no bit: random token trees, and their nodes one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.encoder_decoder import EncoderDecoder
from atspeed.engine.model.graph_form import BLOCK_KEYS
from atspeed.engine.model.invariance import Moved, TreeSizes, check_invariance
from atspeed.training.decoder_graph import DecoderGraph, FloatArithmetic
from atspeed.training.export import MODEL_FILE, write_graph
from atspeed.training.graph_builder import DATA_FILE, WeightFile
from tests.training.exported import CODES, VOCAB, checkpoint
from tests.training.test_t5_export import START
from tests.training.test_t5_export import checkpoint as t5_checkpoint

TOKENS = np.arange(VOCAB)
SHORT, LONG = BLOCK_KEYS // 2, 8192  # positions: with one sum, and with one of their own for nodes
MODELS = {
    "one head per key": {"max_position_embeddings": SHORT},
    "biases": {"max_position_embeddings": LONG},
    "qwen3": {"max_position_embeddings": LONG},
    "gemma": {"max_position_embeddings": SHORT},
    "wide heads": {"max_position_embeddings": LONG, "head_dim": 272},
    "odd heads": {"max_position_embeddings": LONG, "head_dim": 10},
}


IN_INT8 = ("one head per key", "qwen3", "odd heads")


@pytest.fixture(
    scope="module", params=[*((name, "float32") for name in MODELS), *((name, "int8") for name in IN_INT8)], ids=str
)
def decoders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Decoder]:
    model, precision = request.param
    name = model if model in {"one head per key", "biases", "qwen3", "gemma"} else "qwen3"
    return opened(checkpoint(name, **MODELS[model]), tmp_path_factory.mktemp("decoder"), precision)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> list[Decoder]:
    return opened(t5_checkpoint(n_positions=LONG), tmp_path_factory.mktemp("t5"))


def opened(model: PreTrainedModel, folder: Path, precision: Precision = "float32") -> list[Decoder]:
    """The model with one thread, two and four."""
    write_graph(model, folder, CODES, precision)
    kind = EncoderDecoder if model.config.is_encoder_decoder else Decoder
    return [kind(folder / MODEL_FILE, RuntimeOptions(intra_op_threads=threads)) for threads in (1, 2, 4)]


SIZES = st.builds(
    TreeSizes,
    prompt=st.integers(1, 150),
    nodes=st.integers(1, 60),
    depth=st.integers(1, 5),
    trees=st.sampled_from([1, 2, 16]),
)
FEW = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(sizes=SIZES, seed=st.integers(0, 2**32))
def test_no_bit_of_a_node_depends_on_its_company(decoders: Sequence[Decoder], sizes: TreeSizes, seed: int) -> None:
    """Nor on the other trees of a pass, on how the prompt was cut, on cached tokens or on the number of threads."""
    assert check_invariance(decoders, sizes, TOKENS, trees=1, seed=seed).none


@FEW
@given(sizes=SIZES, seed=st.integers(0, 2**32))
def test_nor_in_a_decoder_with_an_encoder(t5: Sequence[Decoder], sizes: TreeSizes, seed: int) -> None:
    found = check_invariance(t5, sizes, TOKENS, trees=1, seed=seed, decoder_start=START)
    assert found.none


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_nodes_on_both_sides_of_a_block_are_summed_as_one_path_is(precision: Precision, tmp_path: Path) -> None:
    """A prompt that ends shortly before a block does: in a shared pass a path's nodes are in two blocks."""
    decoders = opened(checkpoint("qwen3", max_position_embeddings=LONG), tmp_path, precision)
    assert decoders[0].form.node_bias
    found = Moved()
    for seed in range(4):
        part = check_invariance(decoders, TreeSizes(BLOCK_KEYS, 200), TOKENS, trees=1, seed=seed)
        found = replace(found, nodes=found.nodes + part.nodes, moved=found.moved + part.moved)
    assert found.nodes
    assert not found.moved


def test_angles_of_one_token_are_those_of_many(tmp_path: Path) -> None:
    """Heads of 12 have 6 angles a token: alone, the last two fill no vector, and onnxruntime rounds them otherwise."""
    decoders = opened(checkpoint("biases", max_position_embeddings=LONG), tmp_path)
    assert decoders[0].head_dim % 8
    assert check_invariance(decoders, TreeSizes(250, 60, depth=8), TOKENS, trees=25, seed=3).none


def test_the_check_finds_sums_without_an_order(tmp_path: Path) -> None:
    """The graph of older bundles, and of float16."""
    model = checkpoint("qwen3")
    with (tmp_path / DATA_FILE).open("wb") as data:
        graph = DecoderGraph(model, WeightFile(data), FloatArithmetic)
        graph.write(CODES)
    (tmp_path / MODEL_FILE).write_bytes(graph.to_model(len(CODES)).SerializeToString())
    decoder = Decoder(tmp_path / MODEL_FILE, RuntimeOptions())
    assert not decoder.ordered
    found = check_invariance([decoder], TreeSizes(40, 30), TOKENS, trees=5)
    assert found.moved > found.nodes // 2
    assert 0 < found.largest < 1e-3
    assert not found.none


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_long_prompts_and_large_plans(decoders: Sequence[Decoder], seed: int) -> None:
    prompt = 4096 if decoders[0].form.node_bias else SHORT
    assert check_invariance(decoders, TreeSizes(prompt, 512, trees=16), TOKENS, trees=20, seed=seed).none


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_long_prompts_of_an_encoder(t5: Sequence[Decoder], seed: int) -> None:
    sizes = TreeSizes(4096, 512, trees=16)
    assert check_invariance(t5, sizes, TOKENS, trees=10, seed=seed, decoder_start=START).none
