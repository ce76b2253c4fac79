"""A target that is inflated from its exported weights computes what the trained one computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from atspeed.cli.demo.larger_target import BUNDLE, GRAPH, SHAPE
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.engine.model.invariance import TreeSizes, check_invariance
from atspeed.engine.model.onnx_bytes import StoredWeight, stored_weights
from atspeed.training.graph_of_shape import graph_of_shape
from atspeed.training.inflated_export import inflate_export
from atspeed.training.inflation import InflationError, ModelShape
from research.shared_tree_models import load_decoder_of
from tests.bundles import write_run
from tests.catalogues import random_catalogue

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Each size differs from the trained one: 6 layers of 128, 4 heads of 32 on 2 keys.
SLIGHTLY_LARGER = ModelShape(7, 160, 336, heads=5, kv_heads=5, head_dim=64)


@pytest.fixture(scope="module")
def inflated(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("inflated")
    graph = folder / "graph.onnx"
    graph.write_bytes(graph_of_shape(Bundle(BUNDLE), SLIGHTLY_LARGER))
    return Bundle(inflate_export(Bundle(BUNDLE), graph, SLIGHTLY_LARGER, folder / "bundle", label="test"))


def test_its_logits_are_those_of_the_trained_target(inflated: Bundle) -> None:
    """A prompt and its nodes in one causal pass; logits of all codes and the sum over the vocabulary."""
    verify_bundle(inflated.root)
    entry, rng = inflated.model("target"), np.random.default_rng(3)
    assert (entry.layers, entry.kv_heads, entry.head_dim) == (7, 5, 64)
    assert entry.inflated_from == Bundle(BUNDLE).model("target").parameters < entry.parameters
    tokens = np.append(entry.prompt.prefix, rng.choice(entry.code_tokens, 40))
    outputs = []
    for bundle in (Bundle(BUNDLE), inflated):
        decoder, count = load_decoder_of(bundle, "target", 1), len(tokens)
        kv, causal = decoder.empty_kv(count), np.tri(count, dtype=bool)
        found = decoder.run(tokens, np.arange(count), causal, kv[:, :, :0], np.arange(count), kv)
        outputs.append(np.column_stack(found))
    trained, larger = outputs
    assert np.ptp(trained) > 3  # not a model to which everything is alike
    np.testing.assert_allclose(larger, trained, atol=1e-4)


def test_it_is_plan_invariant(inflated: Bundle) -> None:
    decoder = load_decoder_of(inflated, "target", 1)
    tokens = np.asarray(inflated.model("target").code_tokens)
    assert check_invariance([decoder], TreeSizes(prompt=40, nodes=20, trees=3), tokens, trees=6).none


def test_the_demos_graph_is_the_exporters() -> None:
    """After a change of the exporter: `make demo-graph`."""
    assert GRAPH.read_bytes() == graph_of_shape(Bundle(BUNDLE), SHAPE)


def test_weights_lie_where_onnx_says() -> None:
    """The reader of places against the package onnx."""
    graph = onnx.load(str(GRAPH), load_external_data=False).graph
    expected = []
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            where = int(place["offset"]), int(place["length"])
            expected.append(StoredWeight(tensor.name, tuple(tensor.dims), tensor.data_type, *where))
    assert stored_weights(GRAPH.read_bytes()) == expected
    assert len(expected) == 4 + 6 * 12


@pytest.mark.parametrize("cut", [1, 100, 20_000])
def test_half_a_graph_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="not a serialised ONNX model"):
        stored_weights(GRAPH.read_bytes()[:-cut])


def test_a_graph_of_another_shape_leaves_no_bundle(inflated: Bundle) -> None:
    out = inflated.root.parent / "other"
    larger = ModelShape(7, 192, 336, heads=6, kv_heads=6, head_dim=64)
    with pytest.raises(InflationError, match=r"graph.onnx: weight_0 is \[195, 160\], the weight \[195, 192\]"):
        inflate_export(Bundle(BUNDLE), inflated.root.parent / "graph.onnx", larger, out, label="x")
    assert not out.exists()


def test_a_target_that_is_no_such_llama_is_refused(inflated: Bundle) -> None:
    """A checkpoint of random weights, whose head is not the embedding."""
    run = write_run(inflated.root.parent / "run", random_catalogue(300, (16, 12, 10), seed=3), seed=5)
    with pytest.raises(InflationError, match="not those of a Llama whose head is its embedding"):
        inflate_export(run.bundle, inflated.root.parent / "graph.onnx", SLIGHTLY_LARGER, inflated.root, label="x")
