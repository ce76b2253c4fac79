"""Check that the passes of a search without a plan give finite scores."""

from __future__ import annotations

import numpy as np

from atspeed.engine.errors import NoNumbersError
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import ENDED, ROOT, Pruning

_TRIED = 8  # children of a node; a model whose best 8 children all fail is damaged beyond single codes


async def check_plain_passes(evaluator: TreeEvaluator) -> None:
    """Make the passes of a greedy search, from the root down, on an empty history.

    One of a node's best children has to work: a code with damaged weights affects the passes that read it, and no others. Raises
    NoNumbersError when none of them works, or the root does not. Other exceptions of a pass pass through.
    """
    trie = evaluator.trie
    found = await _evaluation(evaluator, ROOT)
    for _ in range(trie.levels - 1):
        if trie.code[found.child[0]] == ENDED:
            return  # the path has ended
        found = await _below(evaluator, found)


async def _below(evaluator: TreeEvaluator, found: Evaluation) -> Evaluation:
    """Return the evaluation of the best child whose pass is finite."""
    problem = NoNumbersError("evaluation: a node without children")
    for child in found.child.tolist():
        try:
            return await _evaluation(evaluator, child)
        except NoNumbersError as error:
            problem = error
    raise problem


async def _evaluation(evaluator: TreeEvaluator, node: int) -> Evaluation:
    """Evaluate one node in a session of its own: a session cannot be used after a pass that is not finite."""
    path = np.append(ROOT, evaluator.trie.with_ancestors([node])).astype(np.int64)
    tree = evaluator.open_synthetic(evaluator.entry.prompt.sample())
    try:
        found, _ = await evaluator.evaluate(tree, path, Selection(Pruning.none(), limit=_TRIED))
    finally:
        evaluator.end(tree)
    return found.last(1)
