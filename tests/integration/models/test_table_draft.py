"""A draft without layers: a table as a graph with the inputs and outputs of a decoder, served like any other draft."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from atspeed.engine.arrays import Float32
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.model.decoder import Decoder, RuntimeOptions, TensorSpec, graph_inputs, graph_outputs
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import Pruning
from draft_service.drafter import DraftRequest
from draft_service.language_model_drafter import LanguageModelDrafter
from tests.catalogues import random_catalogue
from tests.placeholder_bundles import placeholder_entry

LAYERS, HEADS, WIDTH = 1, 1, 1
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def info(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TYPES[spec.dtype], list(spec.axes))


def write_table(path: Path, table: Float32) -> None:
    """Write the graph whose logits after a token are the token's row of the table [V, C]. Its keys and values are zeros."""
    shape = (LAYERS, HEADS, WIDTH, "float32")
    constants = {"table": table, "flat": np.array([-1]), "last_axes": np.array([2, 3]), "zero": np.float32(0)}
    nodes = [
        helper.make_node("Reshape", ["input_ids", "flat"], ["tokens"]),
        helper.make_node("Gather", ["tokens", "out_index"], ["wanted"]),
        helper.make_node("Gather", ["table", "wanted"], ["code_logits"]),
        helper.make_node("ReduceLogSumExp", ["code_logits"], ["log_normalizer"], axes=[1], keepdims=0),
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "zero"], ["zeros"]),
        helper.make_node("Unsqueeze", ["zeros", "last_axes"], ["new_key.0"]),
        helper.make_node("Unsqueeze", ["zeros", "last_axes"], ["new_value.0"]),
    ]
    graph = helper.make_graph(
        nodes,
        "table",
        [info(*each) for each in graph_inputs(*shape).items()],
        [info(*each) for each in graph_outputs(*shape, table.shape[1]).items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


async def test_table_proposes_its_best_codes(tmp_path: Path) -> None:
    catalogue = random_catalogue(60, (6, 5, 4), seed=2)
    trie = catalogue.trie
    entry = placeholder_entry("draft", {}, trie.columns)
    table = np.random.default_rng(1).normal(size=(entry.vocab_size, trie.columns)).astype(np.float32)
    write_table(tmp_path / "model.onnx", table)
    decoder = Decoder(tmp_path / "model.onnx", RuntimeOptions())
    layout = KvLayout(LAYERS, HEADS, WIDTH, "float32", block_tokens=4)
    cache = PrefixCache(layout, MemoryKvCache(0))
    evaluator = TreeEvaluator(decoder, entry, trie, ScoringRule.VOCAB, layout, cache)
    prompt = np.array([1, entry.code_tokens[3]])
    request = DraftRequest(prompt, Beams.root(), PlanSize(BeamWidths.of(2), 2, 4), Proposal.TOP, Pruning.none())
    plan = (await LanguageModelDrafter(evaluator).plan(request)).plan
    await evaluator.close()

    # By hand: the two best first codes after the prompt's last token are in the plan, in the order of the trie.
    first = trie.children(0)
    logits = table[prompt[-1], trie.column(first)]
    expected = np.sort(first[np.argsort(-logits)[:2]])
    assert plan.node[trie.depth(plan.node) == 1].tolist() == expected.tolist()
    second = plan.node[trie.depth(plan.node) == 2]
    assert len(second) == 2
    scores = table[prompt[-1], trie.column(expected)] - np.log(np.exp(table[prompt[-1]]).sum())
    assert np.allclose(plan.score[: len(expected)], scores, atol=1e-5)
