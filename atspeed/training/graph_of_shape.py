"""Writes the graph of a Llama of some shape, without weights: `make demo-graph`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import onnx
from transformers import LlamaConfig, LlamaForCausalLM

from atspeed.engine.bundle.bundle import Bundle
from atspeed.training.export import MODEL_FILE, build_graphs
from atspeed.training.graph_builder import WeightFile
from atspeed.training.inflation import SHAPES, ModelShape

_BUNDLES = Path(__file__).parents[2] / "bundles"


def graph_of_shape(bundle: Bundle, shape: ModelShape) -> bytes:
    """Return the graph of the inflated target of a bundle, a Llama, as the exporter writes it. The weights are left out."""
    entry = bundle.model("target")
    trained = onnx.load(str(bundle.model_path("target")), load_external_data=False).graph
    hidden = next(weight for weight in trained.initializer if weight.name == "weight_0").dims[1]
    (epsilon,) = {
        attribute.f
        for node in trained.node
        if node.op_type == "RMSNormalization"
        for attribute in node.attribute
        if attribute.name == "epsilon"
    }
    config = LlamaConfig(
        vocab_size=entry.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=entry.max_positions,
        rms_norm_eps=float(f"{epsilon:.6g}") * hidden / shape.hidden,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    with TemporaryFile() as weights:
        graphs = build_graphs(model, WeightFile(weights), entry.code_tokens, "float32")
    return graphs[MODEL_FILE].SerializeToString()


def main() -> None:
    """Write the graph of the demo's target beside the shipped bundle."""
    path = _BUNDLES / "movielens-100k-85m.onnx"
    path.write_bytes(graph_of_shape(Bundle(_BUNDLES / "movielens-100k"), SHAPES["85m"]))


if __name__ == "__main__":
    main()
