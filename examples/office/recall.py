"""Serves bundles one by one, and counts how often their lists hold the next item of questions.jsonl.

    python examples/office/recall.py OUT OUT/bundle OUT/with-draft --json OUT/recall.json

OUT is the folder of prepare.py. The lists stand beside those of item-kNN (cosine of co-occurrence) and of popularity, which learn
from the same histories. Items of the history may be recommended again, as in MiniOneRec's evaluation. Passes are those of the
planner as it is served, one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from atspeed.benchmarks.services import ServiceOptions, services

K = 10
SETTLE = 20  # questions before the others, from which the planner learns


def read(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class ItemKnn:
    """Item-kNN: the sum over the history's items of the cosine of co-occurrence."""

    def __init__(self, histories: Sequence[Sequence[str]]) -> None:
        self.count = Counter[str]()
        self._pairs: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for history in map(set, histories):
            self.count.update(history)
            for item in history:
                self._pairs[item].update(history - {item})

    def best(self, history: Sequence[str]) -> list[str]:
        """Return the K best items; the most popular ones fill the list."""
        score = defaultdict[str, float](float)
        for item in history:
            for other, together in self._pairs[item].items():
                score[other] += together / math.sqrt(self.count[item] * self.count[other])
        found = sorted(score, key=lambda item: -score[item])[:K]
        return found + [item for item, _ in self.count.most_common(2 * K) if item not in found][: K - len(found)]


@dataclass(frozen=True)
class Row:
    """One method on all questions.

    Attributes:
        half_width: half of the 95 % interval of the recall.
        to_knn: the difference of the recall to that of item-kNN, question by question.
        to_knn_half_width: half of the 95 % interval of that difference.
        target_passes: the mean of a served list.
        asked_draft: the share of lists for which the draft planned.
    """

    method: str
    questions: int
    recall: float
    half_width: float
    to_knn: float
    to_knn_half_width: float
    target_passes: float | None = None
    asked_draft: float | None = None


@dataclass(frozen=True)
class Served:
    """The lists of a bundle, with the passes of each and the nodes that the draft planned for it."""

    lists: list[list[str]]
    passes: list[int]
    drafted: list[int]


async def served(bundle: Path, histories: Sequence[Sequence[str]], threads: int) -> Served:
    """Start the services of a bundle and ask for every list, one request at a time."""
    async with services(bundle, ServiceOptions(threads=threads)) as client:
        for history in histories[:SETTLE]:
            await client.recommend(history=history, k=K)
        replies = [await client.recommend(history=history, k=K) for history in histories]
    return Served(
        [[item.item_id for item in reply.items] for reply in replies],
        [reply.statistics.target_passes for reply in replies],
        [reply.statistics.nodes_drafted for reply in replies],
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of values and half of its 95 % interval."""
    return fmean(values), 1.96 * stdev(values) / math.sqrt(len(values))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--questions", type=int, default=1_000)
    parser.add_argument("--threads", type=int, default=1, help="of each model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every = read(options.out / "questions.jsonl")
    questions = every[:: -(-len(every) // options.questions)]
    histories = [question["items"] for question in questions]
    knn = ItemKnn([row["items"] for row in read(options.out / "histories.jsonl")])
    popular = [item for item, _ in knn.count.most_common(K)]

    def hits(lists: Sequence[Sequence[str]]) -> list[int]:
        return [question["target"] in items for question, items in zip(questions, lists, strict=True)]

    by_knn = hits([knn.best(history) for history in histories])

    def row(method: str, lists: Sequence[Sequence[str]], **measures: float) -> Row:
        found = hits(lists)
        difference = interval([one - other for one, other in zip(found, by_knn, strict=True)])
        return Row(method, len(questions), *interval(found), *difference, **measures)

    rows = [row("item-kNN", [knn.best(history) for history in histories])]
    rows.append(row("popularity", [popular] * len(questions)))
    for bundle in options.bundles:
        made = asyncio.run(served(bundle, histories, options.threads))
        shares = {"target_passes": fmean(made.passes), "asked_draft": fmean(count > 0 for count in made.drafted)}
        rows.append(row(bundle.name, made.lists, **shares))
    for found in rows:
        passes = (
            f"  {found.target_passes:.2f} passes, draft asked {found.asked_draft:.0%}" if found.target_passes else ""
        )
        print(
            f"{found.method:16} Recall@{K} {found.recall:.4f} ±{found.half_width:.4f}, to item-kNN {found.to_knn:+.4f} "
            f"±{found.to_knn_half_width:.4f}  ({found.questions} questions){passes}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(found) for found in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
