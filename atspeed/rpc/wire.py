"""Converts between protobuf messages and numpy arrays, for both sides of a call.

The bytes come from outside, so every field is checked before it is used. Errors name the field.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int64
from atspeed.engine.kv.memory_cache import NO_USER_KEY, USER_KEY_BYTES
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import COUNTS, PassStats
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import Proposal
from atspeed.engine.search.scoring import Evaluation, Perturbation, ScoringRule
from atspeed.engine.search.trie import Pruning, Trie
from atspeed.errors import InvalidArgumentError
from atspeed.v1 import draft_pb2, recommendation_pb2, target_pb2, types_pb2

_DTYPES: Final[dict[types_pb2.DataType.ValueType, np.dtype[Any]]] = {
    types_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    types_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    types_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    types_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
_BY_NAME: Final[dict[str, np.dtype[Any]]] = {dtype.name: dtype for dtype in _DTYPES.values()}
_DATA_TYPES: Final = {dtype: data_type for data_type, dtype in _DTYPES.items()}
_PROPOSALS: Final[dict[Proposal, draft_pb2.Proposal.ValueType]] = {
    Proposal.TOP: draft_pb2.PROPOSAL_TOP,
    Proposal.PERTURBED: draft_pb2.PROPOSAL_PERTURBED,
    Proposal.SAMPLE: draft_pb2.PROPOSAL_SAMPLE,
}
_RULES: Final[dict[ScoringRule, types_pb2.ScoringRule.ValueType]] = {
    ScoringRule.VOCAB: types_pb2.SCORING_RULE_VOCAB,
    ScoringRule.TRIE: types_pb2.SCORING_RULE_TRIE,
    ScoringRule.CODES: types_pb2.SCORING_RULE_CODES,
}
NS_PER_MS: Final = 1_000_000
"""Times are milliseconds in messages and nanoseconds in the programs, which measure whole ones."""

_TIMES: Final = {name: f"{name.removesuffix('ns')}ms" for name in COUNTS if name.endswith("_ns")}
_MODES: Final = {recommendation_pb2.Mode.Value(f"MODE_{mode.name}"): mode for mode in Mode}

# Points per axis of a cost curve. A measured curve has some tens, so this only bounds the memory of a bad message.
_MAX_CURVE_POINTS = 1024
_MAX_NUMBER = 2**48  # in nanoseconds three days; sums of some thousand such values still fit into int64
_MAX_TIERS = 16  # tiers of a prefix cache in one message; a replica has two


def to_array(values: npt.NDArray[np.generic]) -> types_pb2.Array:
    """Encode an int32, int64, float32 or float64 array."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return types_pb2.Array(dtype=_DATA_TYPES[little.dtype], shape=little.shape, data=little.tobytes())


def vector(message: types_pb2.Array, field: str, dtype: str, *, limit: int | None = None) -> npt.NDArray[np.generic]:
    """Decode a one-dimensional array of `dtype` ("int32" ...), at most `limit` long. An unset field is an empty array.

    The array is a read-only view of the message's bytes. Raises InvalidArgumentError naming `field`.
    """
    wanted = _BY_NAME[dtype]
    if not message.shape and not message.data and not message.dtype:
        return np.empty(0, dtype=wanted)
    if _DTYPES.get(message.dtype) != wanted:
        raise InvalidArgumentError(field, f"must be of dtype {dtype}")
    shape, data = message.shape, message.data
    if len(shape) != 1 or shape[0] < 0:
        raise InvalidArgumentError(field, f"must have one axis, got shape {list(shape)[:8]}")
    if shape[0] * wanted.itemsize != len(data):
        raise InvalidArgumentError(field, f"has {len(data)} bytes for shape {list(shape)} of {dtype}")
    if limit is not None and shape[0] > limit:
        raise InvalidArgumentError(field, f"has {shape[0]} elements, at most {limit} are allowed")
    return np.frombuffer(data, dtype=wanted)


def node_ids(message: types_pb2.Array, field: str, trie: Trie, *, limit: int | None = None) -> Int64:
    """Decode ascending trie nodes, int64 [n]. Raises InvalidArgumentError naming `field`."""
    nodes = vector(message, field, "int32", limit=limit).astype(np.int64)
    if len(nodes) and (nodes[0] < 0 or nodes[-1] >= trie.nodes or (np.diff(nodes) <= 0).any()):
        raise InvalidArgumentError(field, f"must be ascending node ids between 0 and {trie.nodes - 1}")
    return nodes


def to_kept(pruning: Pruning) -> types_pb2.Array | None:
    """Encode the field `kept` of a pruning; None for a pruning by `pruned`."""
    return None if pruning.kept is None else to_array(pruning.kept)


def pruning(message: draft_pb2.PlanRequest | target_pb2.EvaluateStart, prefix: str, trie: Trie) -> Pruning:
    """Decode a request's pruning from `pruned` and `kept`. Raises InvalidArgumentError naming `prefix` and the field."""
    cut = node_ids(message.pruned, f"{prefix}pruned", trie).astype(np.int32)
    if not message.HasField("kept"):
        return Pruning(cut)
    if len(cut):
        raise InvalidArgumentError(f"{prefix}kept", "must not be set beside pruned")
    return Pruning(cut, node_ids(message.kept, f"{prefix}kept", trie).astype(np.int32))


def to_perturbation(perturbation: Perturbation | None) -> types_pb2.Perturbation | None:
    """Encode a perturbation, or None."""
    if perturbation is None:
        return None
    return types_pb2.Perturbation(seed=perturbation.seed, temperature=perturbation.temperature)


def optional_perturbation(message: draft_pb2.PlanRequest | target_pb2.EvaluateStart, field: str) -> Perturbation | None:
    """Decode the perturbation of a message; None if it is not set.

    Raises InvalidArgumentError naming `field` when its seed is below 0 or its temperature is not above 0.
    """
    if not message.HasField("perturbation"):
        return None
    noise = message.perturbation
    if noise.seed < 0:
        raise InvalidArgumentError(f"{field}.seed", f"must be at least 0, got {noise.seed}")
    if not 0 < noise.temperature < math.inf:
        raise InvalidArgumentError(f"{field}.temperature", f"must be above 0 and finite, got {noise.temperature}")
    return Perturbation(noise.seed, noise.temperature)


def beam_widths(message: draft_pb2.PlanRequest | target_pb2.EvaluateStart, prefix: str, trie: Trie) -> BeamWidths:
    """Decode the beam widths of a search. `beam_width` has been checked; the largest of `beam_widths` must equal it.

    Raises InvalidArgumentError naming `prefix` and the field.
    """
    largest, listed = message.beam_width, message.beam_widths
    if len(listed) > trie.levels:
        raise InvalidArgumentError(f"{prefix}beam_widths", f"has {len(listed)} widths for {trie.levels} levels")
    if listed and not (min(listed) > 0 and max(listed) == largest):
        raise InvalidArgumentError(f"{prefix}beam_widths", f"must be above 0, and beam_width ({largest}) the largest")
    return BeamWidths.of(*(listed or [largest]))


def to_proposal(proposal: Proposal) -> draft_pb2.Proposal.ValueType:
    """Encode the draft's proposal."""
    return _PROPOSALS[proposal]


def proposal(value: draft_pb2.Proposal.ValueType, field: str) -> Proposal:
    """Decode the draft's proposal. Raises InvalidArgumentError naming `field`."""
    for known, number in _PROPOSALS.items():
        if number == value:
            return known
    raise InvalidArgumentError(field, "must be one of the proposals of DraftService")


def to_evaluation(evaluation: Evaluation) -> types_pb2.Evaluation:
    """Encode an evaluation."""
    return types_pb2.Evaluation(
        node=to_array(evaluation.node),
        child_start=to_array(evaluation.child_start),
        child=to_array(evaluation.child),
        logp=to_array(evaluation.logp),
        log_mass=to_array(evaluation.log_mass),
    )


def evaluation(message: types_pb2.Evaluation, field: str, trie: Trie) -> Evaluation:
    """Decode and validate an evaluation. Raises InvalidArgumentError naming `field`."""
    result = Evaluation(
        node=vector(message.node, f"{field}.node", "int32").astype(np.int32, copy=False),
        child_start=vector(message.child_start, f"{field}.child_start", "int64").astype(np.int64, copy=False),
        child=vector(message.child, f"{field}.child", "int32").astype(np.int32, copy=False),
        logp=vector(message.logp, f"{field}.logp", "float32").astype(np.float32, copy=False),
        log_mass=vector(message.log_mass, f"{field}.log_mass", "float32").astype(np.float32, copy=False),
    )
    try:
        result.validate(trie)
    except ValueError as error:
        raise InvalidArgumentError(field, str(error)) from error
    return result


def to_scoring_rule(rule: ScoringRule) -> types_pb2.ScoringRule.ValueType:
    """Encode a scoring rule."""
    return _RULES[rule]


def to_mode(mode: Mode) -> recommendation_pb2.Mode.ValueType:
    """Encode a mode."""
    return recommendation_pb2.Mode.Value(f"MODE_{mode.name}")


def mode(value: recommendation_pb2.Mode.ValueType, field: str) -> Mode:
    """Decode a mode; the default is strict. Raises InvalidArgumentError naming `field`."""
    if value == recommendation_pb2.MODE_UNSPECIFIED:
        return Mode.STRICT
    if value not in _MODES:
        raise InvalidArgumentError(field, f"{value} is not a mode of this service")
    return _MODES[value]


def to_statistics(cost: PassStats) -> types_pb2.PassStatistics:
    """Encode pass stats."""
    counts = {name: getattr(cost, name) for name in COUNTS if name not in _TIMES}
    times = {field: getattr(cost, name) / NS_PER_MS for name, field in _TIMES.items()}
    return types_pb2.PassStatistics(**counts, **times, cached_tokens=cost.cached_tokens_by_tier)


def pass_stats(message: types_pb2.PassStatistics, field: str) -> PassStats:
    """Decode pass stats. Raises InvalidArgumentError naming `field` for numbers whose sums could overflow."""
    numbers = {name: getattr(message, name) for name in COUNTS if name not in _TIMES}
    numbers |= {name: getattr(message, column) * NS_PER_MS for name, column in _TIMES.items()}
    cached = dict(message.cached_tokens)
    if not all(0 <= number <= _MAX_NUMBER for number in (*numbers.values(), *cached.values())):
        raise InvalidArgumentError(field, f"must hold numbers between 0 and {_MAX_NUMBER}")
    if len(cached) > _MAX_TIERS:
        raise InvalidArgumentError(field, f"must hold at most {_MAX_TIERS} tiers")
    return PassStats(**{name: round(number) for name, number in numbers.items()}, cached_tokens_by_tier=cached)


def to_cost_curve(curve: CostCurve) -> types_pb2.CostCurve:
    """Encode a cost curve."""
    return types_pb2.CostCurve(
        new_tokens=to_array(curve.new_tokens),
        cached_tokens=to_array(curve.cached_tokens),
        forward_ms=to_array(curve.forward_ns.ravel() / NS_PER_MS),
    )


def user_key(key: bytes, field: str) -> bytes:
    """Decode the user key of a prompt's cached KV. Raises InvalidArgumentError naming `field`."""
    if len(key) not in (0, USER_KEY_BYTES):
        raise InvalidArgumentError(field, f"must have {USER_KEY_BYTES} bytes or none, got {len(key)}")
    return key or NO_USER_KEY


def cost_curve(message: types_pb2.CostCurve, field: str) -> CostCurve:
    """Decode a cost curve. Raises InvalidArgumentError naming `field`."""
    new = vector(message.new_tokens, f"{field}.new_tokens", "int64", limit=_MAX_CURVE_POINTS).astype(np.int64)
    cached = vector(message.cached_tokens, f"{field}.cached_tokens", "int64", limit=_MAX_CURVE_POINTS).astype(np.int64)
    forward = vector(message.forward_ms, f"{field}.forward_ms", "float64").astype(np.float64) * NS_PER_MS
    try:
        return CostCurve(new, cached, forward.reshape(len(new), len(cached)))
    except ValueError as error:
        raise InvalidArgumentError(field, str(error)) from error
