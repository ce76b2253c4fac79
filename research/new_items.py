"""Recall on items that training has not seen, with codes from its quantiser.

A share of the items is held out: the target is trained without them and without the events that name them. Then `catalogue
encode` gives them codes by their texts, `catalogue update` adds them, and the lists of the users who met them later are compared
with the same model's lists for items that it was trained on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.benchmarks.intervals import Interval, bootstrap
from atspeed.benchmarks.results import BenchmarkError, Columns
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.catalogue_update import updated_catalogue
from atspeed.engine.bundle.quantiser import EncodedItem, encode_items
from atspeed.training.data import Dataset, Histories
from atspeed.training.evaluate import BEAMS, EvalExample, Ranking
from atspeed.training.models import SpelledModel
from atspeed.training.pipeline import train
from atspeed.training.recipe import Recipe
from atspeed.training.semantic_ids import text_embeddings
from research.eval_examples import quality

NAME = "new-items"
CUTOFFS = (10, 20)


@dataclass(frozen=True)
class NewItemsConfig:
    """Configuration of the study.

    Attributes:
        share: share of the items that are held out.
        items: the data set's most frequent items that take part; None for all.
        users: most users of a row.
    """

    share: float = 0.1
    items: int | None = None
    users: int = 4000
    seed: int = 1
    threads: int = 1


@dataclass(frozen=True)
class NewItemsRow:
    """The new items, or the old ones.

    Attributes:
        group: `new` or `old`.
        items: items among the answers of the users.
        users: users with such an answer.
        reached: share of these items that stand in the list of 20 of at least one user who met them.
        recall: mean over users, by cutoff.
        by_chance: Recall of a random list, by cutoff.
        on_shared_paths: share of the items whose path is another item's too; None for old ones.
        known_beginnings: share of the items whose first two codes begin a path of the training; None for old ones.
    """

    group: str
    items: int
    users: int
    reached: float
    recall: Mapping[str, Interval]
    by_chance: Mapping[str, float]
    on_shared_paths: float | None = None
    known_beginnings: float | None = None


def frequent_part(dataset: Dataset, count: int | None) -> Dataset:
    """Return the data set of its `count` most frequent items; all of it for None."""
    if count is None or count >= len(dataset.items):
        return dataset
    counts = Counter(
        item for split in (dataset.train, dataset.valid, dataset.test) for items in split.values() for item in items
    )
    return without(dataset, {item.id for item in dataset.items} - {item for item, _ in counts.most_common(count)})


def without(dataset: Dataset, gone: set[str]) -> Dataset:
    """Return the data set without some items and their events."""

    def kept(histories: Histories) -> Histories:
        left = {user: tuple(item for item in items if item not in gone) for user, items in histories.items()}
        return {user: items for user, items in left.items() if items}

    return replace(
        dataset,
        items=tuple(item for item in dataset.items if item.id not in gone),
        train=kept(dataset.train),
        valid=kept(dataset.valid),
        test=kept(dataset.test),
    )


def write_data(dataset: Dataset, folder: Path) -> None:
    """Write a data set as `read_atspeed` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: Iterable[str] = (json.dumps({"id": item.id, "title": item.text}) for item in dataset.items)
    (folder / "items.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for name, histories in (("train", dataset.train), ("valid", dataset.valid), ("test", dataset.test)):
        lines = (" ".join([user, *items]) for user, items in histories.items())
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def run(dataset: Dataset, recipe: Recipe, run_folder: Path, config: NewItemsConfig) -> list[NewItemsRow]:
    """Hold items out, train, encode them, and measure. The training continues where it was stopped.

    Raises BenchmarkError if no user met a new item.
    """
    whole = frequent_part(dataset, config.items)
    ids = sorted(item.id for item in whole.items)
    chosen = np.random.default_rng(config.seed).choice(
        len(ids), size=max(1, round(config.share * len(ids))), replace=False
    )
    held = {ids[place] for place in chosen.tolist()}
    write_data(without(whole, held), run_folder / "data")
    bundle = Bundle(train(recipe, run_folder / "run", run_folder / "data", threads=config.threads))
    encoded = _encoded(bundle, whole, held)
    catalogue = updated_catalogue(bundle.catalogue(), {item: one.codes for item, one in encoded.items()}, ())
    recommender = SpelledModel.load(run_folder / "run" / "target-checkpoint").recommender(recipe, catalogue)
    rows = []
    for group in ("new", "old"):
        examples = _examples(whole, catalogue, held, new=group == "new", config=config)
        if not examples:
            raise BenchmarkError(f"no user of the test split met a {group} item with a history before it")
        row = _row(group, examples, recommender.rank(examples, beams=BEAMS), len(ids), config.seed)
        rows.append(_with_paths(row, encoded) if group == "new" else row)
    return rows


def header(config: NewItemsConfig, dataset: Dataset) -> dict[str, Any]:
    """Return the header's fields."""
    return {"benchmark": NAME, "question": asdict(config), "data": dataset.name}


def _encoded(bundle: Bundle, whole: Dataset, held: set[str]) -> dict[str, EncodedItem]:
    """Return the codes of the held-out items, by their texts alone."""
    catalogue = bundle.catalogue()
    quantiser = bundle.quantiser(catalogue)
    new = [item for item in whole.items if item.id in held]
    embeddings = quantiser.of_texts(text_embeddings([item.text for item in new]))
    return encode_items(quantiser, catalogue, dict(zip([item.id for item in new], embeddings, strict=True)))


def _examples(
    whole: Dataset, catalogue: Catalogue, held: set[str], *, new: bool, config: NewItemsConfig
) -> list[EvalExample]:
    """Return the users with answers of a group, and only those answers."""
    found = []
    for case in whole.cases("test"):
        answers = [item for item in case.targets if (item in held) == new]
        if answers and case.history:
            found.append(EvalExample(catalogue.find(case.history), tuple(catalogue.find(answers).tolist())))
    if len(found) > config.users:
        places = np.random.default_rng(config.seed).choice(len(found), size=config.users, replace=False)
        found = [found[place] for place in np.sort(places).tolist()]
    return found


def _row(
    group: str, examples: Sequence[EvalExample], rankings: Sequence[Ranking], items: int, seed: int
) -> NewItemsRow:
    answers = {item for example in examples for item in example.targets}
    reached = {
        item
        for example, ranking in zip(examples, rankings, strict=True)
        for item in example.targets
        if item in ranking[: max(CUTOFFS)]
    }
    recall = {
        str(cutoff): bootstrap(
            [quality(ranking, one.targets, cutoff).recall for one, ranking in zip(examples, rankings, strict=True)],
            seed=seed,
        )
        for cutoff in CUTOFFS
    }
    chance = {str(cutoff): cutoff / items for cutoff in CUTOFFS}
    return NewItemsRow(group, len(answers), len(examples), len(reached) / len(answers), recall, chance)


def _with_paths(row: NewItemsRow, encoded: Mapping[str, EncodedItem]) -> NewItemsRow:
    shared = sum(bool(one.shares_path_with) for one in encoded.values())
    known = sum(one.known_levels >= 2 for one in encoded.values())
    return replace(row, on_shared_paths=shared / len(encoded), known_beginnings=known / len(encoded))


def _interval(interval: Interval) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


COLUMNS: Columns[NewItemsRow] = (
    ("", lambda row: row.group),
    ("items", lambda row: str(row.items)),
    ("users", lambda row: str(row.users)),
    ("reached", lambda row: _share(row.reached)),
    *((f"Recall@{cutoff}", lambda row, cutoff=cutoff: _interval(row.recall[str(cutoff)])) for cutoff in CUTOFFS),
    ("by chance @20", lambda row: f"{row.by_chance['20']:.4f}"),
    ("shared path", lambda row: _share(row.on_shared_paths)),
    ("two codes known", lambda row: _share(row.known_beginnings)),
)
