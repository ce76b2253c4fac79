"""Exports a draft with heads, and checks it.

Its Llama becomes a decoder that gives the state, and each head a graph of its own. The table of a head has the product of its
`of_path` with the embedding of every code above its level, so that a path costs a sum of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.level_heads import LevelHeadsDecoder, head_file, head_inputs, head_outputs
from atspeed.training.errors import ExportError
from atspeed.training.export import MODEL_FILE, ExportReport, export_decoder
from atspeed.training.export_checks import TOLERANCE
from atspeed.training.graph_builder import GraphBuilder, WeightFile
from atspeed.training.level_heads import LevelHeadsModel

HEADS_DATA_FILE = "heads.onnx.data"
_CHECKED_PATHS = 32  # random paths per level that are compared with the checkpoint


def export_level_heads(
    model: LevelHeadsModel, folder: Path, *, code_tokens: Sequence[int], prompt: PromptTemplate | None = None
) -> ExportReport:
    """Write the decoder and the heads in float32, and check them against the model. Raises ExportError.

    The report counts the parameters of the heads too.

    Args:
        model: float32, eval mode.
        folder: the folder to write into.
        code_tokens: the token id of each code column, [C].
        prompt: whose tokens are tried as well.
    """
    report = export_decoder(model.trunk(), folder, code_tokens=code_tokens, prompt=prompt)
    with (folder / HEADS_DATA_FILE).open("wb") as data:
        weights = WeightFile(data, HEADS_DATA_FILE)
        graphs = {level: _graph(model, level, code_tokens, weights) for level in range(1, len(model.sizes))}
    for level, graph in graphs.items():
        path = folder / head_file(level)
        path.write_bytes(graph.SerializeToString())
        onnx.checker.check_model(str(path))
    _check(model, folder, code_tokens)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return replace(report, parameters=parameters, heads=len(graphs))


def _graph(model: LevelHeadsModel, level: int, code_tokens: Sequence[int], weights: WeightFile) -> onnx.ModelProto:
    """Write the graph of a level's head."""
    graph, head, hidden = GraphBuilder(weights), model.head(level), model.config.hidden_size
    with torch.inference_mode():
        above = torch.tensor(code_tokens[: sum(model.sizes[:level])])
        table = head.of_path(model.embedded(above))
        codes = model.lm_head.weight[model.tokens_of(level)].T
    state = graph.op("Unsqueeze", "state", graph.integers(0))
    of_path = graph.op("ReduceSum", graph.op("Gather", graph.tensor(table), "path"), graph.integers(1), keepdims=0)
    of_state = graph.op("MatMul", state, graph.tensor(head.of_state.weight.T))
    gate, up = graph.split(graph.op("Add", of_state, of_path), [model.config.head_size] * 2)
    active = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
    sum_ = graph.op("Add", state, graph.op("MatMul", active, graph.tensor(head.down_proj.weight.T)))
    normed = graph.op("RMSNormalization", sum_, graph.tensor(head.norm.weight), epsilon=model.config.rms_norm_eps)
    logits = graph.op("MatMul", normed, graph.tensor(codes), name="logits")
    graph.op("ReduceLogSumExp", logits, graph.integers(1), name="log_normalizer", keepdims=0)
    return graph.finished("level_head", head_inputs(level, hidden), head_outputs(model.sizes[level]))


def _check(model: LevelHeadsModel, folder: Path, code_tokens: Sequence[int]) -> None:
    """Raise ExportError when a head computes something else than its checkpoint, on random states and paths."""
    heads = [ModelFiles.read(folder / head_file(level)) for level in range(1, len(model.sizes))]
    decoder = LevelHeadsDecoder(folder / MODEL_FILE, RuntimeOptions(), None, heads)
    random, offsets = np.random.default_rng(0), np.cumsum([0, *model.sizes])
    for level in range(1, len(model.sizes)):
        state = random.normal(size=model.config.hidden_size).astype(np.float32)
        columns = random.integers(offsets[:level], offsets[1 : level + 1], (_CHECKED_PATHS, level))
        found = decoder.score(state, columns)
        expected = _checkpoint_logits(model, level, torch.from_numpy(state), torch.tensor(code_tokens)[columns])
        for one, other in zip(found, (expected, expected.logsumexp(1)), strict=True):
            error = float(np.abs(one - other.numpy()).max())
            if not error <= TOLERANCE["float32"] * max(1.0, float(expected.abs().max())):
                raise ExportError(f"{folder / head_file(level)}: differs from its checkpoint by {error:.2g} in a logit")


@torch.inference_mode()
def _checkpoint_logits(model: LevelHeadsModel, level: int, state: Tensor, tokens: Tensor) -> Tensor:
    path = model.embedded(tokens).sum(1)
    return model.logits_of(level, state.expand(len(tokens), -1), path)
