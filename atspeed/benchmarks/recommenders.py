"""How good the lists are: a run's target and draft beside popularity, item-kNN and SASRec, on one split.

The protocol of `atspeed.training.evaluate`: history = a user's train and validation items, answer = the set of the test items. All
methods answer the same questions and learn from the train split, the validation chooses the epoch of models and SASRec.
item-kNN stands there a second time, refitted: counted on both splits, which takes it seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.eval_examples import Quality, quality
from atspeed.benchmarks.intervals import bootstrap
from atspeed.benchmarks.recommender_table import (
    CUTOFFS,
    NAME,
    REFERENCE,
    REFERENCE_CUTOFF,
    REFITTED,
    Measure,
    RecommenderRow,
)
from atspeed.benchmarks.sasrec import SasRec, Settings
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Bundle
from atspeed.training import evaluate
from atspeed.training.data import Dataset
from atspeed.training.evaluate import EvalExample, ModelRecommender, Ranking, Scorer
from atspeed.training.final_evaluation import recommender
from atspeed.training.models import SpelledModel
from atspeed.training.pipeline import load_dataset
from atspeed.training.recipe import Recipe

_TABLES = {"all": False, "unseen": True}  # whether the items of the history are excluded
_Qualities = list[dict[int, Quality]]
_Rank = Callable[[Sequence[EvalExample], bool], list[Ranking]]


@dataclass(frozen=True)
class TrainedRun:
    """A finished run of `atspeed train` with its data."""

    recipe: Recipe
    folder: Path
    dataset: Dataset
    bundle: Bundle
    catalogue: Catalogue

    @classmethod
    def open(cls, folder: Path, data: Path | None) -> TrainedRun:
        """Raises BenchmarkError when the folder holds none, or one over another data set's items."""
        try:
            recipe = Recipe.model_validate_json((folder / "recipe.json").read_bytes())
        except (OSError, ValueError) as error:
            raise BenchmarkError(f"--run-folder {folder}: not a run of `atspeed train`: {error}") from error
        bundle, dataset = Bundle(folder / "bundle"), load_dataset(recipe, data)
        catalogue = bundle.catalogue()
        ids = [item.id for item in dataset.items]
        unknown = next((item for item, index in zip(ids, catalogue.find(ids), strict=True) if index < 0), None)
        if unknown is not None:
            raise BenchmarkError(f"--data: item {unknown!r} is not in the run's catalogue")
        return cls(recipe, folder, dataset, bundle, catalogue)

    def questions(self, users: int | None, seed: int) -> list[EvalExample]:
        """The test split's, or those of `users` drawn by the seed. Raises BenchmarkError when there are none."""
        cases = self.dataset.cases("test")
        asked = evaluate.eval_examples(
            cases,
            self.catalogue,
            allow_empty=self.recipe.allow_empty_history,
            limit=len(cases) if users is None else users,
            seed=seed,
        )
        if not asked:
            raise BenchmarkError(f"data set {self.dataset.name}: no user with test items")
        return asked


@dataclass(frozen=True)
class Method:
    """What ranks items.

    rank: the best of each question, without the items of their histories or with them. train_seconds: of the processor.
    settings: what it was trained with, where the run does not say so.
    """

    name: str
    rank: _Rank
    train_seconds: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def own_methods(opened: TrainedRun) -> Iterator[Method]:
    """The run's models, from their checkpoints, then popularity and item-kNN, the latter with more data too."""
    for role in opened.bundle.manifest.models:
        checkpoint = opened.folder / f"{role}-checkpoint"
        if not checkpoint.is_dir():
            raise BenchmarkError(f"--run-folder {opened.folder}: it has no {checkpoint.name}")
        yield Method(role, _of_model(recommender(opened.recipe, opened.catalogue, SpelledModel.load(checkpoint))))
    recent = opened.recipe.prompt.max_items
    yield _counted("popularity", lambda: evaluate.popularity(opened.dataset, opened.catalogue))
    yield _counted(REFERENCE, lambda: evaluate.item_knn(opened.dataset, opened.catalogue, recent=recent))
    yield _counted(REFITTED, lambda: evaluate.item_knn(opened.dataset, opened.catalogue, recent=recent, before="test"))


def sasrec(opened: TrainedRun, settings: Settings, *, seed: int) -> Method:
    """SASRec, trained here."""
    begun = time.process_time()
    model = SasRec.train(opened.dataset, opened.catalogue, settings, seed=seed)
    return Method("sasrec", _of_scorer(model.score), time.process_time() - begun, asdict(settings))


def run(asked: Sequence[EvalExample], methods: Sequence[Method], *, seed: int) -> list[RecommenderRow]:
    """A row for each table and method; item-kNN must be one of them. seed: of the bootstrap."""
    rows = []
    for table, exclude_seen in _TABLES.items():
        found = {method.name: _qualities(method.rank(asked, exclude_seen), asked) for method in methods}
        rows += [_row(method, table, found[method.name], found[REFERENCE], seed) for method in methods]
    return rows


def header(opened: TrainedRun, methods: Sequence[Method], *, users: int) -> dict[str, Any]:
    """What the rows were asked for, beside where they come from."""
    return {
        "benchmark": NAME,
        "data": opened.dataset.name,
        "users": users,
        "recent": opened.recipe.prompt.max_items,
        "settings": {method.name: method.settings for method in methods if method.settings},
    }


def _of_model(model: ModelRecommender) -> _Rank:
    return lambda asked, exclude_seen: model.rank(asked, exclude_seen=exclude_seen)


def _of_scorer(scorer: Scorer) -> _Rank:
    return lambda asked, exclude_seen: evaluate.rank_by(scorer, asked, exclude_seen=exclude_seen)


def _counted(name: str, count: Callable[[], Scorer]) -> Method:
    begun = time.process_time()
    scorer = count()
    return Method(name, _of_scorer(scorer), time.process_time() - begun)


def _qualities(rankings: Sequence[Ranking], asked: Sequence[EvalExample]) -> _Qualities:
    """Of each user's list, by cutoff."""
    return [
        {cutoff: quality(ranking, question.targets, cutoff) for cutoff in CUTOFFS}
        for ranking, question in zip(rankings, asked, strict=True)
    ]


def _row(method: Method, table: str, found: _Qualities, reference: _Qualities, seed: int) -> RecommenderRow:
    recall, ndcg = ({at: [getattr(each[at], name) for each in found] for at in CUTOFFS} for name in ("recall", "ndcg"))
    of_reference = [each[REFERENCE_CUTOFF].recall for each in reference]
    differences = [own - other for own, other in zip(recall[REFERENCE_CUTOFF], of_reference, strict=True)]
    return RecommenderRow(
        method=method.name,
        table=table,
        users=len(found),
        recall={str(at): _measure(values, seed) for at, values in recall.items()},
        ndcg={str(at): _measure(values, seed) for at, values in ndcg.items()},
        recall_less_item_knn=None if method.name == REFERENCE else bootstrap(differences, seed=seed),
        train_seconds=None if method.train_seconds is None else round(method.train_seconds, 2),
    )


def _measure(values: Sequence[float], seed: int) -> Measure:
    found = bootstrap(values, seed=seed)
    return Measure(found.value, (found.high - found.low) / 2)
