"""Token tree of a search that ended, from its memo and its recording."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.trie import ROOT, Trie
from orchestrator.explanation.explanation import MAX_NODES, NodeOrigin, SearchNode, SearchTree
from orchestrator.explanation.recording import RecordedSearch
from orchestrator.recommendation import Diagnostics, Recommendation
from orchestrator.search.memo import Memo


def search_tree(
    recommendation: Recommendation, recorded: RecordedSearch, catalogue: Catalogue, limit: int = MAX_NODES
) -> SearchTree:
    """Return the evaluated nodes and all beams: at most `limit`, beams first, then the most probable ones."""
    diagnostics, trie = recommendation.diagnostics, catalogue.trie
    memo = diagnostics.memo
    if not memo.levels:  # nothing was searched
        return SearchTree((), 0)
    ranks = _beam_ranks(diagnostics)
    nodes = _closed(trie, {*memo.evaluated, *ranks})
    log_p = _log_p(memo, nodes)
    score = _scores(trie, nodes, log_p)
    kept = _most_probable(nodes, ranks, score, limit)
    place = {node: index for index, node in enumerate(kept)}
    log_q = _log_q(trie, recorded, memo.drafted)
    pass_number = _pass_number(recorded)
    items = _items_by_leaf(recommendation, catalogue)
    shown = [
        SearchNode(
            parent=-1 if node == ROOT else place[int(trie.parent[node])],
            level=level,
            code=int(trie.code[node]),
            origin=_origin(memo, node),
            used=node in ranks,
            log_p=log_p.get(node),
            log_q=log_q.get(node),
            score=score.get(node),
            pass_number=pass_number.get(node, 0),
            beam_rank=ranks.get(node, 0),
            item_ids=items.get(node, ()),
        )
        for node, level in zip(kept, trie.depth(np.asarray(kept)).tolist(), strict=True)
    ]
    return SearchTree(shown, len(nodes) - len(kept))


def _beam_ranks(diagnostics: Diagnostics) -> dict[int, int]:
    """Return the rank of every beam on its level, from 1."""
    levels = [*(beams.node for beams in diagnostics.memo.levels), diagnostics.leaves.node]
    return {node: rank for nodes in levels for rank, node in enumerate(nodes.tolist(), start=1)}


def _closed(trie: Trie, nodes: Iterable[int]) -> list[int]:
    """Return the nodes and their ancestors, ascending."""
    return [ROOT, *trie.with_ancestors(np.fromiter(nodes, dtype=np.int64)).tolist()]


def _log_p(memo: Memo, nodes: Sequence[int]) -> dict[int, float]:
    """Return the target's log-probability of each node that it returned with its parent; 0 for the root."""
    found = {ROOT: 0.0}
    wanted = set(nodes)
    for children in memo.evaluated.values():
        pairs = zip(children.node.tolist(), children.logp.tolist(), strict=True)
        found.update((node, logp) for node, logp in pairs if node in wanted)
    for node in wanted - found.keys():  # certain ones that no pass and no search asked for
        parent = int(memo.trie.parent[node])
        if parent not in memo.evaluated and memo.certain(np.array([parent]))[0]:
            found[node] = 0.0
    return found


def _scores(trie: Trie, nodes: Sequence[int], log_p: Mapping[int, float]) -> dict[int, float]:
    """Return the sums of log_p along each path, as the search adds them."""
    score = {ROOT: 0.0}
    for node in nodes[1:]:
        above = score.get(int(trie.parent[node]))
        if above is not None and node in log_p:
            score[node] = above + log_p[node]
    return score


def _most_probable(nodes: Sequence[int], beams: Mapping[int, int], score: Mapping[int, float], limit: int) -> list[int]:
    """Return at most `limit` nodes, ascending and closed under ancestors: no node comes before its parent in this order."""

    def order(node: int) -> tuple[bool, float, int]:
        return node not in beams, -score.get(node, -np.inf), node

    return sorted(sorted(nodes, key=order)[:limit]) if len(nodes) > limit else list(nodes)


def _log_q(trie: Trie, recorded: RecordedSearch, drafted: set[int]) -> dict[int, float]:
    """Return the draft's log-probability of each drafted node after its parent, by the first plan that held it."""
    found: dict[int, float] = {}
    for plan in recorded.plans:
        above = dict(zip(plan.start.node.tolist(), plan.start.score.tolist(), strict=True))
        for node, score in zip(plan.node.tolist(), plan.score.tolist(), strict=True):
            above[node] = score
            if node in drafted:
                found.setdefault(node, score - above[int(trie.parent[node])])
    return found


def _pass_number(recorded: RecordedSearch) -> dict[int, int]:
    """Return the number of the first pass that evaluated each node."""
    pass_number: dict[int, int] = {}
    for number, nodes in enumerate(recorded.passes, start=1):
        for node in nodes.tolist():
            pass_number.setdefault(node, number)
    return pass_number


def _items_by_leaf(recommendation: Recommendation, catalogue: Catalogue) -> Mapping[int, Sequence[str]]:
    """Return the items of the list by the leaf of their path."""
    ids = [item.item_id for item in recommendation.items]
    leaves: Int64 = catalogue.leaf_of(catalogue.find(ids))
    items: dict[int, list[str]] = defaultdict(list)
    for leaf, item in zip(leaves.tolist(), ids, strict=True):
        items[leaf].append(item)
    return items


def _origin(memo: Memo, node: int) -> NodeOrigin:
    if node == ROOT:
        return NodeOrigin.ROOT
    for origin, nodes in (
        (NodeOrigin.RECOVERED, memo.recovered),
        (NodeOrigin.DRAFTED, memo.drafted),
        (NodeOrigin.PREFETCHED, memo.prefetched),
    ):
        if node in nodes:
            return origin
    return NodeOrigin.FORCED if node in memo.evaluated else NodeOrigin.UNEVALUATED
