"""Graph that selects the best children of trie nodes on a device, from scores.

It computes what `atspeed.engine.search.scoring.best_children` computes, in float32. It knows neither model nor catalogue:
their arrays are inputs that stay on the device, and the catalogue's are swapped with the catalogue. `width` is above the
largest number of children, so the last place of a row never holds a child.

| input               | type    | axes         |                                                                      |
|---------------------|---------|--------------|----------------------------------------------------------------------|
| scores              | float32 | rows, C      | of the pass, from the device graph                                   |
| first_child         | int32   | nodes        | the catalogue's: the first child of each node                        |
| end_child           | int32   | nodes        | the catalogue's: one after the last child of each node               |
| column              | int32   | nodes        | the catalogue's: the column of each node's own code; 0 without one   |
| distinct            | int32   | D            | rule `codes` only: one column of each code token; see `column_of`    |
| place               | int32   | width        | the catalogue's: 0, 1, ... width - 1                                 |
| node                | int32   | rows         | the evaluated node of each row                                       |
| live_by_default     | bool    | rows         | true where a child is live unless named by `exceptions`              |
| exceptions          | int64   | f            | places, in the flattened rows x width, of the other children         |
| exceptions_live     | bool    | f            | whether these are live; padding is the last place of row 0 and false |
| inverse_temperature | float32 | rows         | 1 without perturbation                                               |
| noise               | float32 | rows, width  | added to the order; either axis may be 1                             |
| limit               | int64   | 1            | k, the children of a row, at most `width`                            |

| output   | type    | axes    |                                                                                     |
|----------|---------|---------|-------------------------------------------------------------------------------------|
| child    | int32   | rows, k | trie nodes, best first; what follows the live children of a row means nothing       |
| logp     | float32 | rows, k | their log-probabilities under the rule, never perturbed                             |
| log_mass | float32 | rows    | log of the sum of exp(logp / temperature) over all live children                    |
| faults   | float32 | rows    | children whose log-probability is NaN, and live ones of probability 0               |
"""

from __future__ import annotations

import numpy as np

from atspeed.engine.model.onnx_bytes import Node, Tensor, model_bytes
from atspeed.engine.search.scoring import ScoringRule

_LOWEST = np.float32(-1e30)  # of what is no live child: far below any score, and finite, as inf - inf is NaN

_CONSTANTS = {
    "lowest": np.asarray(_LOWEST),
    "zero": np.asarray(0, dtype=np.float32),
    "least": np.asarray(np.finfo(np.float32).min),
    "row_axis": np.asarray([1]),
    "flat": np.asarray([-1]),
    "first": np.asarray([0]),
}


def selection_graph(rule: ScoringRule) -> bytes:
    """Return the graph of a scoring rule, as a serialised model."""
    nodes = [*_children(), *_log_probabilities(rule), *_live(), *_faults(), *_selected(), *_log_mass()]
    float_row, int_row = ("float32", ("rows",)), ("int32", ("rows",))
    by_node = ("int32", ("nodes",))
    inputs = {
        "scores": ("float32", ("rows", "columns")),
        "first_child": by_node,
        "end_child": by_node,
        "column": by_node,
        **({"distinct": ("int32", ("tokens",))} if rule is ScoringRule.CODES else {}),
        "place": ("int32", ("width",)),
        "node": int_row,
        "live_by_default": ("bool", ("rows",)),
        "exceptions": ("int64", ("exceptions",)),
        "exceptions_live": ("bool", ("exceptions",)),
        "inverse_temperature": float_row,
        "noise": ("float32", ("noise_rows", "noise_width")),
        "limit": ("int64", (1,)),
    }
    outputs = {
        "child": ("int32", ("rows", "k")),
        "logp": ("float32", ("rows", "k")),
        "log_mass": float_row,
        "faults": float_row,
    }
    fed, fetched = ([Tensor(name, *spec) for name, spec in tensors.items()] for tensors in (inputs, outputs))
    return model_bytes(nodes, fed, fetched, _CONSTANTS)


def _node(operator: str, inputs: str, output: str, **attributes: int) -> Node:
    return Node(operator, tuple(inputs.split()), (output,), attributes)


def _children() -> list[Node]:
    """Write the children of each row: ids [rows, width], which of them exist, and ids that are safe to look up."""
    return [
        _node("Gather", "first_child node", "first_of_row"),
        _node("Unsqueeze", "first_of_row row_axis", "first_in_row"),
        _node("Add", "first_in_row place", "candidate"),
        _node("Gather", "end_child node", "end_of_row"),
        _node("Unsqueeze", "end_of_row row_axis", "end_in_row"),
        _node("Less", "candidate end_in_row", "exists"),
        # What does not exist looks up the row's own node.
        _node("Unsqueeze", "node row_axis", "node_in_row"),
        _node("Where", "exists candidate node_in_row", "known"),
        _node("Gather", "column known", "column_of_child"),
    ]


def _log_probabilities(rule: ScoringRule) -> list[Node]:
    """Write log-probabilities [rows, width] under the rule, 0 where there is no child."""
    if rule is ScoringRule.TRIE:
        scored = [
            _node("GatherElements", "scores column_of_child", "score", axis=1),
            _node("Where", "exists score lowest", "of_children"),
            _node("LogSoftmax", "of_children", "logp_of_child", axis=1),
        ]
    elif rule is ScoringRule.CODES:
        scored = [
            _node("Gather", "scores distinct", "of_tokens", axis=1),
            _node("LogSoftmax", "of_tokens", "logp_of_token", axis=1),
            _node("GatherElements", "logp_of_token column_of_child", "logp_of_child", axis=1),
        ]
    else:
        scored = [_node("GatherElements", "scores column_of_child", "logp_of_child", axis=1)]
    # Rounding may leave a near-certain code slightly above 0.
    return [
        *scored,
        _node("Where", "exists logp_of_child zero", "unbounded"),
        _node("Min", "unbounded zero", "bounded"),
    ]


def _live() -> list[Node]:
    """Write which places hold a live child, bool [rows, width]."""
    return [
        _node("Unsqueeze", "live_by_default row_axis", "default_in_row"),
        _node("And", "exists default_in_row", "by_default"),
        _node("Reshape", "by_default flat", "flat_default"),
        _node("ScatterElements", "flat_default exceptions exceptions_live", "flat_live", axis=0),
        _node("Shape", "exists", "shape"),
        _node("Reshape", "flat_live shape", "live"),
    ]


def _faults() -> list[Node]:
    """Count the children of a row that make its evaluation worthless."""
    return [
        _node("IsNaN", "unbounded", "is_nan"),
        _node("Less", "unbounded least", "is_impossible"),
        _node("And", "is_impossible live", "lives_in_vain"),
        _node("Or", "is_nan lives_in_vain", "is_fault"),
        _node("Cast", "is_fault", "fault", to=1),
        _node("ReduceSum", "fault row_axis", "faults", keepdims=0),
    ]


def _selected() -> list[Node]:
    """Write the best live children of each row."""
    return [
        _node("Unsqueeze", "inverse_temperature row_axis", "inverse_in_row"),
        _node("Mul", "bounded inverse_in_row", "scaled_all"),
        _node("Where", "live scaled_all lowest", "scaled"),
        _node("Add", "scaled noise", "order"),
        Node("TopK", ("order", "limit"), ("order_of_best", "best"), {"axis": 1}),
        _node("GatherElements", "candidate best", "child", axis=1),
        _node("GatherElements", "bounded best", "logp", axis=1),
    ]


def _log_mass() -> list[Node]:
    """Write the log-sum-exp of the scaled log-probabilities: at any place, the value less its log-softmax."""
    return [
        _node("Gather", "best first", "best_of_row", axis=1),
        _node("LogSoftmax", "scaled", "normalised", axis=1),
        _node("GatherElements", "scaled best_of_row", "scaled_of_best", axis=1),
        _node("GatherElements", "normalised best_of_row", "normalised_of_best", axis=1),
        _node("Sub", "scaled_of_best normalised_of_best", "mass_in_row"),
        _node("Squeeze", "mass_in_row row_axis", "log_mass"),
    ]
