"""Whether a model's plain passes give numbers: those of a search for which nothing is planned."""

from __future__ import annotations

import numpy as np

from atspeed.engine.errors import NoNumbersError
from atspeed.engine.model.tree_evaluator import Selection, TreeEvaluator
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import ROOT, Pruning

_TRIED = 8  # children of a node


async def check_plain_passes(evaluator: TreeEvaluator) -> None:
    """Make some of the passes of a greedy search, from the root down, on an empty history.

    Of a node's best children one has to work: a code whose weights are damaged spoils the passes that read it, and no others.
    Raises NoNumbersError when none of them does, or the root does not; and whatever else a pass raises.
    """
    trie = evaluator.trie
    found = await _evaluation(evaluator, ROOT)
    for _ in range(trie.levels - 1):
        found = await _below(evaluator, found)


async def _below(evaluator: TreeEvaluator, found: Evaluation) -> Evaluation:
    """The evaluation of the best of a node's children that has one."""
    problem = NoNumbersError("evaluation: a node without children")
    for child in found.child.tolist():
        try:
            return await _evaluation(evaluator, child)
        except NoNumbersError as error:
            problem = error
    raise problem


async def _evaluation(evaluator: TreeEvaluator, node: int) -> Evaluation:
    """Of a node alone, on a tree of its own: one that has had a spoilt pass is of no use."""
    path = np.append(ROOT, evaluator.trie.with_ancestors([node])).astype(np.int64)
    tree = evaluator.rehearsal(evaluator.entry.prompt.tokens([]))
    try:
        found, _ = await evaluator.evaluate(tree, path, Selection(Pruning.none(), limit=_TRIED))
    finally:
        evaluator.end(tree)
    return found.last(1)
