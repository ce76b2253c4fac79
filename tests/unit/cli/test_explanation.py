"""The explanation of a list in a terminal, without services."""

from __future__ import annotations

import io
import math

from rich.console import Console, RenderableType

from atspeed.cli.explanation import stage_table, token_tree
from atspeed_client import Explanation
from atspeed_client.explanations import to_explanation
from atspeed_client.v1 import explanation_pb2
from atspeed_client.v1 import recommendation_pb2 as pb


def shown(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def explanation() -> Explanation:
    node, span, drafted = explanation_pb2.SearchNode, explanation_pb2.StageSpan, explanation_pb2.NODE_ORIGIN_DRAFTED
    reply = pb.ExplainResponse(
        nodes=[
            node(parent=-1, used=True, origin=explanation_pb2.NODE_ORIGIN_ROOT),
            node(level=1, code=7, used=True, origin=drafted, log_p=math.log(0.25), log_q=math.log(0.031)),
        ],
        stages=[
            span(stage=explanation_pb2.STAGE_PASS, duration_ms=10.0, pass_number=1, nodes=1),
            span(stage=explanation_pb2.STAGE_PASS, start_ms=10.0, duration_ms=10.0, pass_number=2, in_advance=True),
        ],
    )
    return to_explanation(reply, "")


def test_p_and_q_of_a_node_are_probabilities() -> None:
    assert "p 0.25  q 0.031" in shown(token_tree(explanation()))


def test_a_terminal_of_80_columns_holds_every_bar() -> None:
    text = shown(stage_table(explanation()))
    assert "…" not in text
    first, second = (line.rpartition("│")[0].rpartition("│")[2] for line in text.splitlines() if "█" in line)
    assert first.count("█") == second.count("█")
    assert second.index("█") > first.rindex("█")
