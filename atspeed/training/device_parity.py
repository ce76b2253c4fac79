"""Compares a device graph with its checkpoint, on random trees that share passes.

onnxruntime's CPU provider runs the graph, except in bfloat16, for which it lacks kernels. The slots of the trees are
interleaved at random, the trees have different lengths, and prompt and nodes are read in a pass each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from transformers import PreTrainedModel

from atspeed.engine.arrays import Float32, Int64
from atspeed.engine.bundle.manifest import Head
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.model.decoder import RuntimeOptions, check_contract, graph_specs, open_session, run_bound
from atspeed.engine.model.device_graph import (
    CAPACITY_STEP,
    FREE_SLOTS_FROM,
    SCORES,
    SCRATCH_SLOT,
    ZERO_SLOT,
    device_inputs,
    device_outputs,
)
from atspeed.training.decoder_graph import DecoderShape
from atspeed.training.parity import RandomTree, checkpoint_outputs, log_probabilities

_FILLERS = {"float32": 1e4, "float16": 30.0}
_TREES = ((12, 12), (7, 5), (10, 9))  # lengths of prefix and nodes


def compare_device(
    model: PreTrainedModel, path: Path, code_tokens: Sequence[int], dtype: str, head: Head
) -> tuple[float, float]:
    """Return the largest absolute difference and the largest absolute value of all scores; NaN if one is NaN.

    Raises BundleError when the file cannot be loaded or breaks the contract of a device graph.
    """
    shape = DecoderShape.of(model)
    session = open_session(ModelFiles.read(path), RuntimeOptions())
    inputs, outputs = graph_specs(session)
    sizes = (shape.layers, shape.kv_heads, shape.head_dim, dtype)
    check_contract(path, "input", inputs, device_inputs(*sizes))
    check_contract(path, "output", outputs, device_outputs(*sizes, len(code_tokens), head))
    random = np.random.default_rng(0)
    trees = [RandomTree.grow(random, shape.vocab_size, prefix=prefix, nodes=nodes) for prefix, nodes in _TREES]
    expected = np.concatenate([checkpoint_scores(model, tree, code_tokens, head) for tree in trees])
    found = np.concatenate(device_scores(session, trees, head))
    return float(np.abs(found - expected).max()), float(np.abs(expected).max())


def checkpoint_scores(model: PreTrainedModel, tree: RandomTree, code_tokens: Sequence[int], head: Head) -> Float32:
    """Return the checkpoint's scores of the code tokens, [nodes + 1, C]."""
    outputs = checkpoint_outputs(model, tree, code_tokens)
    return log_probabilities(outputs) if head == "vocab" else outputs[:, :-1]


def device_scores(
    session: ort.InferenceSession, trees: Sequence[RandomTree], head: Head, seed: int = 0
) -> list[Float32]:
    """Return the scores of each tree, [nodes + 1, C], from one pass over the prefixes and one over the nodes.

    session: a device graph on the CPU provider. seed: of the places of the trees in the pools.
    """
    inputs, outputs = graph_specs(session)
    random = np.random.default_rng(seed)
    used = sum(len(tree.tokens) for tree in trees)
    slots = FREE_SLOTS_FROM + random.permutation(2 * used)[:used]
    # Other slots hold large numbers: a graph that reads one would not compute the same. Products with them must stay finite,
    # as those with any keys of requests do: a mask cannot hide an infinite score.
    pools = {
        name: np.full((FREE_SLOTS_FROM + 2 * used, spec.fixed[1] or 0), _FILLERS[spec.dtype], dtype=spec.dtype)
        for name, spec in inputs.items()
        if "_pool" in name
    }
    for pool in pools.values():
        pool[ZERO_SLOT] = 0
    placed = np.split(slots, np.cumsum([len(tree.tokens) for tree in trees])[:-1])
    parts = []
    for nodes in (False, True):
        feeds, counts = _pass_inputs(trees, placed, nodes=nodes)
        scores = np.empty((sum(counts), outputs[SCORES[head]].fixed[1] or 0), dtype=np.float32)
        written = {name.replace("_pool.", "_pool_out."): pool for name, pool in pools.items()}
        run_bound(session, feeds | pools, {SCORES[head]: scores, **written})
        parts.append(np.split(scores, np.cumsum(counts)[:-1]))
    return [np.concatenate(tree) for tree in zip(*parts, strict=True)]


@dataclass(frozen=True)
class _TreeRows:
    """The new tokens of one tree in a pass, each [S] or [S, depth]."""

    input_ids: Int64
    position_ids: Int64
    write_slots: Int64
    prefix_lengths: Int64
    ancestors: npt.NDArray[np.int32]


def _pass_inputs(
    trees: Sequence[RandomTree], placed: Sequence[Int64], *, nodes: bool
) -> tuple[dict[str, npt.NDArray[Any]], list[int]]:
    """Return the inputs of a pass over the prefixes, or over the nodes, and the number of scored tokens of each tree."""
    rows = [_tree_rows(tree, slots, nodes=nodes) for tree, slots in zip(trees, placed, strict=True)]
    count, depth = max(len(row.input_ids) for row in rows), max(row.ancestors.shape[1] for row in rows)
    longest = max(len(tree.tokens) for tree in trees)
    table = np.full((len(trees), -(-longest // CAPACITY_STEP) * CAPACITY_STEP), ZERO_SLOT, dtype=np.int32)
    for places, slots in zip(table, placed, strict=True):
        places[: len(slots)] = slots
    # A prefix is scored at its last token, nodes all.
    scored = [np.arange(len(row.input_ids)) if nodes else np.array([len(row.input_ids) - 1]) for row in rows]
    feeds: dict[str, npt.NDArray[Any]] = {
        name: np.stack([_padded(getattr(row, name), count) for row in rows])
        for name in ("input_ids", "position_ids", "prefix_lengths")
    }
    padding = [np.full(count - len(row.input_ids), SCRATCH_SLOT) for row in rows]
    feeds["write_slots"] = np.stack([np.append(row.write_slots, rest) for row, rest in zip(rows, padding, strict=True)])
    widened = [np.pad(row.ancestors, ((0, 0), (0, depth - row.ancestors.shape[1]))) for row in rows]
    feeds["ancestors"] = np.stack([_padded(places, count) for places in widened])
    feeds["slot_table"] = table
    feeds["out_index"] = np.concatenate([chosen + row * count for row, chosen in enumerate(scored)])
    return feeds, [len(chosen) for chosen in scored]


def _tree_rows(tree: RandomTree, slots: Int64, *, nodes: bool) -> _TreeRows:
    start, end = (tree.prefix, len(tree.tokens)) if nodes else (0, tree.prefix)
    below = tree.visible[start:end, tree.prefix :]
    places = [tree.prefix + np.flatnonzero(row) for row in below]
    # Spare entries are place 0, which every token sees.
    ancestors = np.zeros((end - start, max(1, *(len(seen) for seen in places))), dtype=np.int32)
    for row, seen in zip(ancestors, places, strict=True):
        row[: len(seen)] = seen
    prefix = np.full(end - start, tree.prefix) if nodes else np.arange(1, end + 1)
    return _TreeRows(tree.tokens[start:end], tree.positions[start:end], slots[start:end], prefix, ancestors)


def _padded(values: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Return the values with copies of the first at the end, `count` in all."""
    return np.concatenate([values, np.repeat(values[:1], count - len(values), axis=0)])
