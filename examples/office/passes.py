"""Counts the target passes of a list by K and by the nodes of a plan, beside plans of the planner and no draft at all.

    python examples/office/passes.py OUT OUT/bundle OUT/with-draft --json OUT/passes.json

OUT is the folder of prepare.py. Both bundles are served in turn. The first has no draft: `plain` is its beam search
with a pass for each level, and `no draft` is its `strict` search, with target prefetch. Plans of a fixed size ask the draft for
every list. Planner and prefetch weigh the time of passes, which depends on the machine; plans of a fixed size do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from atspeed.benchmarks.intervals import half_width
from atspeed.benchmarks.services import ServiceOptions, started
from atspeed_client import Statistics

PLAIN, NO_DRAFT = "plain", "no draft"
SETTLE = 20  # questions before the others, from which prefetch and planner learn


@dataclass(frozen=True)
class Row:
    """The lists of one K under one rule for plans.

    Attributes:
        plan: nodes of a plan, `planner`, `no draft` or `plain`.
        target_passes: the mean of a list.
        half_width: half of the 95 % interval of that mean.
        one_pass: share of lists that took one pass.
        asked_draft: share of lists for which the draft planned.
        nodes: mean nodes that the target evaluated for plans or prefetched.
        used: mean nodes of those that became beams.
    """

    plan: str
    k: int
    questions: int
    target_passes: float
    half_width: float
    one_pass: float
    asked_draft: float
    nodes: float
    used: float


async def measured(
    bundle: Path, plan: str, widths: Sequence[int], histories: Sequence[Sequence[str]], threads: int
) -> list[Row]:
    """Start the services of a bundle and ask for every list, for each K."""
    flags = {name: dict(values) for name, values in ServiceOptions(threads=threads).flags.items()}
    if plan.isdigit():
        # The whole budget for each list, however few its beams are.
        flags["orchestrator"] |= {"planner": "fixed", "draft-nodes-per-beam": 64, "draft-max-nodes": plan}
    rows, mode = [], "target-only" if plan == PLAIN else "strict"
    async with started(bundle, flags) as services:
        for k in widths:
            asked = [*histories[:SETTLE], *histories]
            replies = [
                await services.client.recommend(history=history, k=k, beam_width=k, mode=mode) for history in asked
            ]
            rows.append(row(plan, k, [reply.statistics for reply in replies[-len(histories) :]]))
            print(
                f"K = {k:2}  {plan:8}  {rows[-1].target_passes:.2f} ±{rows[-1].half_width:.2f} passes, "
                f"{rows[-1].nodes:.0f} nodes, {rows[-1].used:.0f} of them used, draft asked {rows[-1].asked_draft:.0%}",
                flush=True,
            )
    return rows


def row(plan: str, k: int, found: Sequence[Statistics]) -> Row:
    """Return the row of lists with these statistics."""
    passes = [one.target_passes for one in found]
    return Row(
        plan,
        k,
        questions=len(found),
        target_passes=fmean(passes),
        half_width=half_width(passes),
        one_pass=fmean(count == 1 for count in passes),
        asked_draft=fmean(one.nodes_drafted > 0 for one in found),
        nodes=fmean(one.nodes_drafted + one.nodes_prefetched for one in found),
        used=fmean(one.nodes_used + one.nodes_prefetched_used for one in found),
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("without", type=Path, help="the bundle without a draft")
    parser.add_argument("bundle", type=Path, help="the bundle with a draft")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--plan", nargs="+", default=[PLAIN, NO_DRAFT, "60", "120", "240", "planner"])
    parser.add_argument("-k", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lines = (options.out / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = lines[:: -(-len(lines) // options.questions)]
    histories = [json.loads(line)["items"] for line in chosen]
    rows = []
    for plan in options.plan:
        bundle = options.without if plan in (PLAIN, NO_DRAFT) else options.bundle
        rows += asyncio.run(measured(bundle, plan, options.k, histories, options.threads))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
