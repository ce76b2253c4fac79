"""The best-first cut from its definition, over paths: everything is looked at anew for every level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from atspeed.engine.search.plan import PlanSize
from atspeed.engine.search.scoring import ScoringRule
from tests.oracles.naive_search import width_of
from tests.oracles.naive_trie import NaiveTrie, Path


@dataclass(frozen=True)
class NaivePlan:
    """planned: the paths of the plan, by depth and path, and their margins. expanded: those that each draft pass had to read,
    below the start.
    """

    planned: list[Path]
    margins: list[float]
    expanded: list[list[Path]]


def has_one_path(trie: NaiveTrie, path: Path) -> bool:
    """Return whether the catalogue, exclusions or not, leaves no choice below a path."""
    return len({own for own in trie.items.values() if own[: len(path)] == path}) == 1


def never_needs_a_pass(trie: NaiveTrie, rule: ScoringRule, path: Path) -> bool:
    """Return whether the target needs no pass for anything below a path."""
    return trie.has_ended(path) or (rule is ScoringRule.TRIE and has_one_path(trie, path))


def naive_plan(
    trie: NaiveTrie,
    start: Sequence[Path],
    priority: Mapping[Path, float],
    size: PlanSize,
    scales: Sequence[float],
    free: Callable[[Path], bool],
) -> NaivePlan:
    """The plan below some paths of one depth. priority: of every live path. free: which paths never need the target."""
    depth = len(start[0])
    margin = dict.fromkeys(start, math.inf)
    listed, expanded = list(start), [list(start)]
    known, own, deepest = set(start), set(start), set(start)
    most = trie.levels if size.levels is None else size.levels
    for level in range(depth + 1, min(trie.levels, depth + 1 + most)):
        candidates = sorted(
            (path for path in priority if len(path) == level and path[:-1] in known),
            key=lambda path: (-priority[path], path),
        )
        below = [path for path in candidates if path[:-1] in deepest]
        beams = width_of(size.beam_widths.listed, level)
        threshold = priority[below[beams - 1]] if len(below) >= beams else -math.inf
        deepest = set(below[:beams])
        own |= deepest
        by_preference = sorted(candidates, key=lambda path: path not in own)
        wanted = [path for path in by_preference if not free(path)][: size.width]
        for path in wanted:
            margin[path] = min(margin[path[:-1]], (priority[path] - threshold) / scales[level - 1])
        listed = sorted(
            listed + wanted, key=lambda path: (path not in own, -margin[path], len(path), -priority[path], path)
        )
        listed = listed[: len(start) + size.max_nodes]
        expanded.append(sorted(path for path in listed if len(path) == level))
        known = {*expanded[-1], *(path for path in candidates if free(path))}
    planned = sorted((path for path in listed if len(path) > depth), key=lambda path: (len(path), path))
    return NaivePlan(planned, [margin[path] for path in planned], [paths for paths in expanded[:-1] if paths])
