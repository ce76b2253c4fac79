"""Inputs and results of the selection on a device (selection_graph.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Float32, Int32, Int64
from atspeed.engine.errors import NoNumbersError
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.sampling import Stream, gumbel
from atspeed.engine.search.scoring import Evaluation, ScoringRule
from atspeed.engine.search.trie import ENDED, ROOT, Trie

# Rows are as wide as the largest number of children, and at least one more, in steps of this.
_WIDTH_STEP = 8
LEAST_TEMPERATURE = 1e-3
"""The lowest temperature of the selection on a device: float32 holds log-probabilities divided by it."""


@dataclass(frozen=True)
class RowSelection:
    """One tree's rows of a pass, and what is asked of them.

    Attributes:
        nodes: the evaluated nodes, ascending inner nodes, int64 [n].
        selection: pruning, limit and perturbation.
    """

    nodes: Int64
    selection: Selection


@dataclass(frozen=True)
class Selected:
    """The outputs of the graph; see selection_graph.py."""

    child: Int32
    logp: Float32
    log_mass: Float32
    faults: Float32


class DeviceSelection:
    """The catalogue of one model on a device, as arrays, and the selections of its passes.

    Args:
        trie: the catalogue's trie.
        rule: the scoring rule.
        code_tokens: the token id of each code column, int64 [C].
    """

    def __init__(self, trie: Trie, rule: ScoringRule, code_tokens: Int64) -> None:
        self._trie = trie
        self.width = -(-(int(trie.child_count.max(initial=0)) + 1) // _WIDTH_STEP) * _WIDTH_STEP
        own = np.arange(trie.nodes)
        has_code = (own != ROOT) & (trie.code != ENDED)
        column = np.zeros(trie.nodes, dtype=np.int64)
        column[has_code] = trie.column(own[has_code])
        arrays: dict[str, Int32] = {
            "first_child": trie.child_start[:-1].astype(np.int32),
            "end_child": trie.child_start[1:].astype(np.int32),
            "place": np.arange(self.width, dtype=np.int32),
        }
        if rule is ScoringRule.CODES:  # levels may share tokens
            _, distinct, column_of = np.unique(code_tokens, return_index=True, return_inverse=True)
            arrays["distinct"] = distinct.astype(np.int32)
            column = column_of[column]
        self.catalogue: dict[str, Int32] = {**arrays, "column": column.astype(np.int32)}
        """The inputs that stay on the device until the catalogue changes."""

    def inputs(self, rows: Sequence[RowSelection]) -> dict[str, npt.NDArray[Any]]:
        """Return the other inputs of a pass but the scores, for the rows of its trees one after the other."""
        counts = [len(part.nodes) for part in rows]
        starts = np.cumsum([0, *counts[:-1]])
        exceptions = [
            (start + row) * self.width + place
            for part, start in zip(rows, starts.tolist(), strict=True)
            for row, place in (self._exceptions(part),)
        ]
        allowed = [part.selection.pruning.kept is not None for part in rows]
        pad = self.width - 1  # of a pass without exceptions: no child of row 0
        live = np.repeat(allowed, [len(places) for places in exceptions])
        return {
            "node": np.concatenate([part.nodes for part in rows]).astype(np.int32),
            "live_by_default": np.repeat(np.logical_not(allowed), counts),
            "exceptions": np.append(np.concatenate(exceptions), pad).astype(np.int64),
            "exceptions_live": np.append(live, False),
            "inverse_temperature": np.repeat([1 / _temperature(part) for part in rows], counts).astype(np.float32),
            "noise": self._noise(rows),
            "limit": np.array([min(self.width, max(part.selection.limit for part in rows))]),
        }

    def evaluations(self, rows: Sequence[RowSelection], found: Selected) -> list[Evaluation | NoNumbersError]:
        """Return the evaluation of each tree, or the error of one whose scores are no numbers."""
        ends = np.cumsum([len(part.nodes) for part in rows])[:-1]
        parts = (np.split(values, ends) for values in (found.child, found.logp, found.log_mass, found.faults))
        return [self._evaluation(part, Selected(*outputs)) for part, *outputs in zip(rows, *parts, strict=True)]

    def _evaluation(self, part: RowSelection, found: Selected) -> Evaluation | NoNumbersError:
        trie, nodes = self._trie, part.nodes
        if found.faults.any():
            return NoNumbersError(f"evaluation: some of {len(nodes)} nodes have scores that are no numbers")
        live = self._live_counts(part)
        kept = np.minimum(live, part.selection.limit)
        within = np.arange(found.child.shape[1]) < kept[:, None]
        log_mass = np.where(live > 0, found.log_mass, -np.inf).astype(np.float32)
        # An ended place scores 0, whatever the graph looked up for it.
        ended = trie.ends[nodes]
        logp = np.where(ended[:, None], np.float32(0), found.logp)
        log_mass[ended & (live > 0)] = 0
        starts = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
        return Evaluation(nodes.astype(np.int32), starts, found.child[within], logp[within], log_mass)

    def _exceptions(self, part: RowSelection) -> tuple[Int64, Int64]:
        """Return the children that the pruning names, as rows and places: those removed, or those kept of an allow-list."""
        pruning = part.selection.pruning
        named = (pruning.cut if pruning.kept is None else pruning.kept).astype(np.int64)
        named = named[named != ROOT]
        parent = self._trie.parent[named]
        row = np.minimum(np.searchsorted(part.nodes, parent), len(part.nodes) - 1)
        below = part.nodes[row] == parent
        return row[below], named[below] - self._trie.child_start[parent[below]]

    def _live_counts(self, part: RowSelection) -> Int64:
        """Return the number of live children of each node, int64 [n]."""
        row, _ = self._exceptions(part)
        named = np.bincount(row, minlength=len(part.nodes))
        if part.selection.pruning.kept is not None:
            return named
        return np.asarray(self._trie.child_count[part.nodes] - named)

    def _noise(self, rows: Sequence[RowSelection]) -> Float32:
        """Return the noise of every child's path, float32 [rows, width]; [1, 1] if no tree is perturbed."""
        if all(part.selection.perturbation is None for part in rows):
            return np.zeros((1, 1), dtype=np.float32)
        return np.concatenate([self._noise_of(part) for part in rows])

    def _noise_of(self, part: RowSelection) -> Float32:
        noise = np.zeros((len(part.nodes), self.width), dtype=np.float32)
        if part.selection.perturbation is not None:
            row, child = self._trie.children_of(part.nodes)
            keys = self._trie.path_hash(child)
            place = child - self._trie.child_start[part.nodes][row]
            noise[row, place] = gumbel(part.selection.perturbation.seed, Stream.GUMBEL, keys)
        return noise


def _temperature(part: RowSelection) -> float:
    return part.selection.perturbation.temperature if part.selection.perturbation else 1.0
