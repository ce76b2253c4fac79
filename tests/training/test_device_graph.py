"""The device graph computes what its checkpoint and the host's graph compute, with KV in pools that it writes in place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from atspeed.engine.bundle.manifest import Head, Precision
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.model.decoder import Decoder, RuntimeOptions, open_session, run_bound
from atspeed.engine.model.device_graph import DEVICE_FILE, FREE_SLOTS_FROM, SCRATCH_SLOT, ZERO_SLOT
from atspeed.training.device_graph import DeviceGraph
from atspeed.training.device_parity import checkpoint_scores, device_scores
from atspeed.training.errors import ExportError
from atspeed.training.export import MODEL_FILE, export_decoder
from atspeed.training.graph_builder import DATA_FILE
from atspeed.training.parity import RandomTree, checkpoint_outputs, decoder_outputs, log_probabilities
from tests.bundles import random_model

VOCAB = 97
CODES = tuple(range(40, 90))
SCATTERED = (60, 41, 77, 41, 90)
HEADS: tuple[Head, ...] = ("vocab", "codes")
FORMATS: tuple[Precision, ...] = ("float32", "float16", "bfloat16")
CHECKPOINTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "one head per key": ("llama", {"num_key_value_heads": 4}),
    "one key for all heads": ("llama", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"head_dim": 20}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
}


def checkpoint(name: str = "llama") -> PreTrainedModel:
    """A checkpoint whose weights have the size that training leaves; norms are random, as ones would hide a missing one."""
    architecture, shape = CHECKPOINTS[name]
    model = random_model(architecture, VOCAB, seed=3, initializer_range=0.15, **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def opened(folder: Path) -> ort.InferenceSession:
    return open_session(ModelFiles.read(folder / DEVICE_FILE), RuntimeOptions())


def graph_of(folder: Path, name: str = DEVICE_FILE) -> onnx.GraphProto:
    return onnx.load(folder / name, load_external_data=False).graph


def places(graph: onnx.GraphProto) -> dict[int, int]:
    """Offset -> length of every weight in the data file."""
    outside = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
    assert {place["location"] for place in outside if place} == {DATA_FILE}
    return {int(place["offset"]): int(place["length"]) for place in outside if place}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_trees_of_different_lengths_in_one_pass_score_as_the_checkpoint(name: str, head: Head, tmp_path: Path) -> None:
    model = checkpoint(name)
    export_decoder(model, tmp_path, code_tokens=CODES, head=head)
    random = np.random.default_rng(5)
    trees = [RandomTree.grow(random, VOCAB, prefix=prefix, nodes=nodes) for prefix, nodes in ((9, 14), (30, 3), (1, 8))]
    for tree, found in zip(trees, device_scores(opened(tmp_path), trees, head), strict=True):
        np.testing.assert_allclose(found, checkpoint_scores(model, tree, CODES, head), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_the_device_graph_scores_as_the_hosts(name: str, tmp_path: Path) -> None:
    export_decoder(checkpoint(name), tmp_path, code_tokens=SCATTERED)
    tree = RandomTree.grow(np.random.default_rng(2), VOCAB, prefix=20, nodes=25)
    host = decoder_outputs(Decoder(tmp_path / MODEL_FILE, RuntimeOptions()), tree)
    [found] = device_scores(opened(tmp_path), [tree], "vocab")
    np.testing.assert_allclose(found, log_probabilities(host), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A checkpoint with grouped queries, and its export."""
    model, folder = checkpoint("qwen3"), tmp_path_factory.mktemp("exported")
    export_decoder(model, folder, code_tokens=SCATTERED, head="codes")
    return model, folder


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_trees_on_any_slots_score_as_the_checkpoint(
    exported: tuple[PreTrainedModel, Path], lengths: list[tuple[int, int]], seed: int
) -> None:
    model, folder = exported
    random = np.random.default_rng(seed)
    trees = [RandomTree.grow(random, VOCAB, prefix=prefix, nodes=nodes) for prefix, nodes in lengths]
    for tree, found in zip(trees, device_scores(opened(folder), trees, "codes", seed), strict=True):
        np.testing.assert_allclose(found, checkpoint_outputs(model, tree, SCATTERED)[:, :-1], atol=1e-5, rtol=0)


def test_slots_do_not_change_a_bit(exported: tuple[PreTrainedModel, Path]) -> None:
    session, random = opened(exported[1]), np.random.default_rng(0)
    trees = [RandomTree.grow(random, VOCAB, prefix=7, nodes=9), RandomTree.grow(random, VOCAB, prefix=3, nodes=4)]
    one, other = (device_scores(session, trees, "codes", seed) for seed in (1, 2))
    assert all(np.array_equal(*scores) for scores in zip(one, other, strict=True))


def test_a_pass_writes_its_slots_in_place_and_no_other(exported: tuple[PreTrainedModel, Path]) -> None:
    """A prompt of two tokens and two nodes side by side, in one pass, with a padding token."""
    model, folder = exported
    session = opened(folder)
    pools = {
        pool.name: np.full((9, pool.shape[1]), 5, np.float32) for pool in session.get_inputs() if "pool" in pool.name
    }
    for pool in pools.values():
        pool[ZERO_SLOT] = 0
    scores = np.empty((3, len(SCATTERED)), dtype=np.float32)
    feeds = {
        "input_ids": np.array([[11, 12, 50, 51, 11]]),
        "position_ids": np.array([[0, 1, 2, 2, 0]]),
        "write_slots": np.array([[7, 3, 8, 4, SCRATCH_SLOT]]),
        "slot_table": np.array([[7, 3, 8, 4, 0, 0, 0, 0]], dtype=np.int32),
        "prefix_lengths": np.array([[1, 2, 2, 2, 1]]),
        "ancestors": np.array([[[0], [0], [2], [3], [0]]], dtype=np.int32),
        "out_index": np.array([1, 2, 3]),
    }
    run_bound(
        session, feeds | pools, {"code_logits": scores, **{n.replace("pool", "pool_out"): p for n, p in pools.items()}}
    )
    visible = np.tri(4, dtype=bool)
    visible[3, 2] = False
    tree = RandomTree(2, np.array([11, 12, 50, 51]), np.array([0, 1, 2, 2]), visible)
    np.testing.assert_allclose(scores, checkpoint_outputs(model, tree, SCATTERED)[:, :-1], atol=1e-5, rtol=0)
    assert FREE_SLOTS_FROM == 2
    for pool in pools.values():
        assert not pool[ZERO_SLOT].any()
        assert (pool[[2, 5, 6]] == 5).all()
        assert (pool[[1, 3, 4, 7, 8]] != 5).any(axis=1).all()


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("codes", [CODES, SCATTERED])
@pytest.mark.parametrize("head", HEADS)
def test_both_graphs_read_the_same_bytes(
    precision: Precision, codes: tuple[int, ...], head: Head, tmp_path: Path
) -> None:
    export_decoder(checkpoint(), tmp_path, code_tokens=codes, precision=precision, head=head)
    host, device = places(graph_of(tmp_path, MODEL_FILE)), places(graph_of(tmp_path))
    table = max(host)  # the head, written last
    end, row = table + host[table], host[table] // VOCAB
    inside = {offset: length for offset, length in device.items() if offset < end and host.get(offset) != length}
    assert inside == ({table + CODES[0] * row: len(CODES) * row} if head == "codes" and codes == CODES else {})
    assert sum(length for offset, length in device.items() if offset >= end) <= 8  # zero and the lowest number


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma"])
def test_16_bits_have_the_operators_of_float32(name: str, head: Head, tmp_path: Path) -> None:
    """No CPU runs bfloat16, so its graph is compared with one that is checked: rotation and scores have more casts.

    Attention is another operator in 16 bits.
    """
    operators = []
    for precision in FORMATS:
        export_decoder(checkpoint(name), tmp_path / precision, code_tokens=CODES, precision=precision, head=head)
        onnx.checker.check_model(str(tmp_path / precision / DEVICE_FILE), full_check=True)
        graph = graph_of(tmp_path / precision)
        operators.append(Counter(node.op_type.removeprefix("MultiHead") for node in graph.node))
        assert {onnx.helper.tensor_dtype_to_string(value.type.tensor_type.elem_type) for value in graph.input} == {
            "TensorProto.INT64",
            "TensorProto.INT32",
            f"TensorProto.{precision.upper().replace('FLOAT32', 'FLOAT')}",
        }
    assert operators[1] == operators[2]
    assert operators[1] - operators[0] == Counter(Cast=2)
    assert not operators[0] - operators[1]


def test_a_device_graph_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceGraph, "activation", lambda graph, gate: graph.op("Relu", gate))
    with pytest.raises(ExportError, match=rf"{DEVICE_FILE}: differs from its checkpoint by"):
        export_decoder(checkpoint(), tmp_path, code_tokens=CODES)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_device_graph_leaves_none(tmp_path: Path) -> None:
    assert export_decoder(checkpoint(), tmp_path, code_tokens=CODES, head="codes").head == "codes"
    assert export_decoder(checkpoint(), tmp_path, code_tokens=CODES, precision="int8", head="codes").head is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL_FILE, DATA_FILE]


def test_a_host_graph_in_bfloat16_computes_in_float32_from_rounded_weights(tmp_path: Path) -> None:
    model = checkpoint()
    export_decoder(model, tmp_path, code_tokens=CODES, precision="bfloat16")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    tree = RandomTree.grow(np.random.default_rng(2), VOCAB)
    decoder = Decoder(tmp_path / MODEL_FILE, RuntimeOptions())
    assert decoder.dtype == np.float32
    np.testing.assert_allclose(
        decoder_outputs(decoder, tree), checkpoint_outputs(model, tree, CODES), atol=1e-5, rtol=0
    )
