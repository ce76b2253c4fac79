"""Formats explanations of lists: the token tree, the time by stage, absent items."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from atspeed_client import Explanation, ItemExplanation, NodeOrigin, SearchNode, Stage, StageSpan

_SHOWN_NODES = 200  # fits a terminal's scrollback; --json has all nodes
_BAR = 16  # what 80 columns leave
_STYLES = {
    NodeOrigin.DRAFTED: "green",
    NodeOrigin.PREFETCHED: "cyan",
    NodeOrigin.RECOVERED: "yellow",
    NodeOrigin.FORCED: "blue",
}


def token_tree(found: Explanation) -> Tree:
    """Draw the nodes of the search: beams first, then the most probable ones, as many as fit a terminal."""
    shown = sorted(range(len(found.nodes)), key=lambda place: _order(found.nodes[place], place))[:_SHOWN_NODES]
    below: Mapping[int, list[int]] = defaultdict(list)
    for place in sorted(shown, key=lambda place: (found.nodes[place].beam_rank or 10**9, place)):
        below[found.nodes[place].parent].append(place)
    tree = Tree("the search; a line is a node: code, origin, pass, p of the target, q of the draft, rank of a beam")
    if shown:
        _grow(tree, below, found, below[-1][0])
    left_out = len(found.nodes) - len(shown) + found.nodes_left_out
    if left_out:
        tree.add(f"and {left_out} nodes that are less probable; --json shows more of them")
    return tree


def stage_table(found: Explanation) -> Table:
    """Draw the waterfall of the request's time."""
    shown = Table(title="time in ms", title_justify="left")
    for name in ("stage", "start", "duration", "in the model", "nodes"):
        shown.add_column(name, justify="left" if name == "stage" else "right")
    shown.add_column("", no_wrap=True)
    total = max((span.start_ms + span.duration_ms for span in found.stages), default=0.0) or 1.0
    for span in found.stages:
        model = f"{span.forward_ms:.1f}" if span.stage is Stage.PASS else ""
        bar = " " * int(_BAR * span.start_ms / total) + "█" * max(1, round(_BAR * span.duration_ms / total))
        times = f"{span.start_ms:.1f}", f"{span.duration_ms:.1f}"
        shown.add_row(_stage_name(span), *times, model, str(span.nodes or ""), bar)
    return shown


def item_lines(item: ItemExplanation, found: Explanation) -> str:
    """Return why an item is not in the list, and its place on each level."""
    title = found.titles.get(item.item_id)
    lines = [f"{item.item_id}{f' ({title})' if title else ''}: {item.description}"]
    if item.wider_rank:
        lines.append(f"  rank {item.wider_rank} of the target alone with beam width {found.wider_beam_width}")
    for level, step in enumerate(item.path, start=1):
        place = f"rank {step.rank} of the candidates, {step.beam_width} kept" if step.rank else "not compared"
        lines.append(f"  level {level}: code {step.code}, log p {step.log_p:.3f}, score {step.score:.3f}, {place}")
    return "\n".join(lines)


def _order(node: SearchNode, place: int) -> tuple[bool, float, int]:
    """Return the key by which a parent comes before its children."""
    return not node.used, -(node.score if node.score is not None else float("-inf")), place


def _grow(tree: Tree, below: Mapping[int, list[int]], found: Explanation, place: int) -> None:
    branch = tree.add(_label(found.nodes[place], found.titles))
    for child in below[place]:
        _grow(branch, below, found, child)


def _label(node: SearchNode, titles: Mapping[str, str]) -> Text:
    words = ["root" if not node.level else "end" if node.code < 0 else str(node.code)]
    if node.level and node.origin is not NodeOrigin.UNEVALUATED:
        words.append(f"{node.origin}{'' if node.used else ', unused'}")
    words += [f"pass {node.pass_number}"] if node.pass_number else []
    words += [f"p {_probability(node.log_p)}"] if node.level and node.log_p is not None else []
    words += [f"q {_probability(node.log_q)}"] if node.log_q is not None else []
    words += [f"#{node.beam_rank}"] if node.level and node.beam_rank else []
    words += [titles.get(item, item) for item in node.item_ids]
    style = _STYLES.get(node.origin, "") if node.used else "dim"
    return Text("  ".join(words), style=style)


def _probability(log: float) -> str:
    return f"{math.exp(log):#.2g}"


def _stage_name(span: StageSpan) -> str:
    number = f" {span.pass_number}" if span.pass_number else ""
    return f"{span.stage}{number}{', in advance' if span.in_advance else ''}"
