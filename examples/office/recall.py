"""Asks a served bundle for the lists of questions.jsonl, and counts how often they hold the next item.

    python examples/office/recall.py OUT --address 127.0.0.1:50051

OUT is the folder of train_checkpoint.py. The lists stand beside those of item-kNN (cosine of co-occurrence) and of popularity,
which learn from the same histories. Items of the history may be recommended again, as in MiniOneRec's evaluation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atspeed_client import AsyncClient

K = 10


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


async def served(address: str, histories: Sequence[Sequence[str]]) -> tuple[list[list[str]], float]:
    """Return the served lists, and the mean number of target passes."""
    async with AsyncClient(address) as client:
        replies = [await client.recommend(history=history, k=K) for history in histories]
    passes = sum(reply.statistics.target_passes for reply in replies) / len(replies)
    return [[item.item_id for item in reply.items] for reply in replies], passes


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--questions", type=int, default=1_000)
    options = parser.parse_args()
    questions = read(options.out / "questions.jsonl")[:: max(1, 4_866 // options.questions)]
    histories = [question["items"] for question in questions]
    knn = ItemKnn([row["items"] for row in read(options.out / "histories.jsonl")])
    popular = [item for item, _ in knn.count.most_common(K)]
    lists, passes = asyncio.run(served(options.address, histories))
    methods = {
        "served": lists,
        "item-kNN": [knn.best(history) for history in histories],
        "popularity": [popular] * len(histories),
    }
    for name, found in methods.items():
        hits = sum(question["target"] in items for question, items in zip(questions, found, strict=True))
        share = hits / len(questions)
        half_width = 1.96 * math.sqrt(share * (1 - share) / len(questions))
        print(f"{name:10}  Recall@{K} {share:.4f} ±{half_width:.4f}  ({len(questions)} questions)")
    print(f"target passes of a served list: {passes:.2f}")


if __name__ == "__main__":
    main()
