"""Recall and NDCG of a run's models, popularity, item-kNN and SASRec.

The protocol is that of `atspeed.training.evaluate`: the history is a user's train and validation items, the answer is the set
of the test items. All methods get the same histories and learn from the train split; the validation split chooses the epoch
of models and of SASRec. The refitted item-kNN counts both splits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group

from atspeed.benchmarks import markdown
from atspeed.benchmarks.intervals import Interval, bootstrap
from atspeed.benchmarks.markdown import paragraphs, row_table
from atspeed.benchmarks.results import BenchmarkError, Columns, Result, terminal_table
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.training import evaluate
from atspeed.training.data import Dataset
from atspeed.training.evaluate import EvalExample, ModelRecommender, Ranking, Scorer
from atspeed.training.models import SpelledModel
from atspeed.training.pipeline import load_dataset
from atspeed.training.recipe import Recipe
from research.eval_examples import Quality, quality
from research.sasrec import SasRec, SasRecSettings

NAME = "recommenders"
CUTOFFS = (5, 10, 20)
REFERENCE = "item-knn"  # the others are compared with it, user by user
REFITTED = "item-knn-refitted"
REFERENCE_CUTOFF = 10
_EXCLUDES_SEEN = {"all": False, "unseen": True}
_TITLES = {"all": "Nothing excluded", "unseen": "Items of the history excluded"}
_Qualities = list[dict[int, Quality]]
_Rank = Callable[[Sequence[EvalExample], bool], list[Ranking]]


@dataclass(frozen=True)
class Measure:
    """Mean over users. ci95: half width of its 95 % bootstrap interval."""

    mean: float
    ci95: float


@dataclass(frozen=True)
class RecommenderRow:
    """One method in one table: `all`, nothing excluded, or `unseen`, without the items of the history.

    Attributes:
        recall, ndcg: by cutoff.
        recall_less_item_knn: Recall@10 less that of item-kNN for the same users, a paired bootstrap.
        train_seconds: processor time; None for the run's own models, whose training may have been interrupted.
    """

    method: str
    table: str
    users: int
    recall: Mapping[str, Measure]
    ndcg: Mapping[str, Measure]
    recall_less_item_knn: Interval | None = None
    train_seconds: float | None = None


def _measure_of(name: str, cutoff: int, row: RecommenderRow) -> str:
    measure = (row.recall if name == "Recall" else row.ndcg)[str(cutoff)]
    return f"{measure.mean:.4f} ±{measure.ci95:.4f}"


def _difference(row: RecommenderRow) -> str:
    found = row.recall_less_item_knn
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]" if found else ""


COLUMNS: Columns[RecommenderRow] = (
    ("", lambda row: row.method),
    *((f"{name}@{at}", partial(_measure_of, name, at)) for name in ("Recall", "NDCG") for at in CUTOFFS),
    (f"Recall@{REFERENCE_CUTOFF} less {REFERENCE}", _difference),
    ("training", lambda row: "" if row.train_seconds is None else f"{row.train_seconds:.1f} s"),
)


@dataclass(frozen=True)
class TrainedRun:
    """Finished run of `atspeed train` with its data."""

    recipe: Recipe
    folder: Path
    dataset: Dataset
    bundle: Bundle
    catalogue: Catalogue

    @classmethod
    def open(cls, folder: Path, data: Path | None) -> TrainedRun:
        """Open a run. Raises BenchmarkError if the folder holds none, or one over the items of another data set."""
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

    def eval_examples(self, users: int | None, seed: int) -> list[EvalExample]:
        """Return the test split's questions, or those of `users` drawn by the seed. Raises BenchmarkError without any."""
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
    """Method that ranks items.

    Attributes:
        rank: returns the best items of each question, with or without the items of the histories.
        train_seconds: processor time.
        settings: settings of its training that the run does not record.
    """

    name: str
    rank: _Rank
    train_seconds: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def own_methods(opened: TrainedRun) -> Iterator[Method]:
    """Yield the run's models from their checkpoints, then popularity, item-kNN and the refitted item-kNN."""
    for role in opened.bundle.manifest.models:
        checkpoint = opened.folder / f"{role}-checkpoint"
        if not checkpoint.is_dir():
            raise BenchmarkError(f"--run-folder {opened.folder}: it has no {checkpoint.name}")
        yield Method(role, _of_model(SpelledModel.load(checkpoint).recommender(opened.recipe, opened.catalogue)))
    recent = opened.recipe.prompt.max_items
    yield _counted("popularity", lambda: evaluate.popularity(opened.dataset, opened.catalogue))
    yield _counted(REFERENCE, lambda: evaluate.item_knn(opened.dataset, opened.catalogue, recent=recent))
    yield _counted(REFITTED, lambda: evaluate.item_knn(opened.dataset, opened.catalogue, recent=recent, before="test"))


def sasrec(opened: TrainedRun, settings: SasRecSettings, *, seed: int) -> Method:
    """Train SASRec."""
    begun = time.process_time()
    model = SasRec.train(opened.dataset, opened.catalogue, settings, seed=seed)
    return Method("sasrec", _of_scorer(model.score), time.process_time() - begun, asdict(settings))


def run(asked: Sequence[EvalExample], methods: Sequence[Method], *, seed: int) -> list[RecommenderRow]:
    """Return a row for each table and method. Item-kNN must be one of them. seed: seed of the bootstrap."""
    rows = []
    for table, exclude_seen in _EXCLUDES_SEEN.items():
        found = {method.name: _qualities(method.rank(asked, exclude_seen), asked) for method in methods}
        rows += [_row(method, table, found[method.name], found[REFERENCE], seed) for method in methods]
    return rows


def header(opened: TrainedRun, methods: Sequence[Method], *, users: int) -> dict[str, Any]:
    """Return the header's fields."""
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
    """Return the quality of each user's list, by cutoff."""
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


def tables(rows: Sequence[RecommenderRow]) -> Group:
    """Return the tables with and without the items of the history."""
    return Group(
        *(terminal_table(f"{title}, {found[0].users} users", COLUMNS, found) for title, found in _by_table(rows))
    )


def write(result: Result, folder: Path) -> Path:
    """Write the page of a result file. Returns its path."""
    return markdown.write(folder / "recommenders.md", _page(result.header, result.rows_of(NAME, RecommenderRow)))


def _page(header: Mapping[str, Any], rows: Sequence[RecommenderRow]) -> Iterator[str]:
    machine, bundle = header["machine"], header["bundle"]
    yield from paragraphs(
        "# Recommenders",
        f"{header['users']} users of {header['data']}: the history before the test items is given, the set of the test items "
        f"is the answer. ± is half of a 95 % bootstrap interval over users; Recall@{REFERENCE_CUTOFF} less that of {REFERENCE} "
        "is over the same users, with its 95 % interval.",
    )
    yield from markdown.command(header)
    for title, found in _by_table(rows):
        yield from paragraphs(f"## {title}")
        yield from row_table(COLUMNS, found)
    parameters = ", ".join(f"{role} {count:,} parameters" for role, count in bundle["parameters"].items())
    yield (
        f"Target and draft: {bundle['name']}, version {bundle['version']}, {parameters}. "
        f"Training: processor time; of target and draft it is in the run's folder. Item-kNN: the newest {header['recent']} "
        f"items; all methods learn from the train split, {REFITTED} from the validation too. "
        f"{machine['processor']}, {machine['cores']} cores, revision {header['revision'] or 'unknown'}, "
        f"{header['created_at']}."
    )
    for method, settings in header["settings"].items():
        yield from ("", f"{method}: {', '.join(f'{name} {value}' for name, value in settings.items())}.")


def _by_table(rows: Iterable[RecommenderRow]) -> Iterator[tuple[str, list[RecommenderRow]]]:
    """Yield title and rows of each table that is not empty."""
    rows = list(rows)
    for name, title in _TITLES.items():
        if found := [row for row in rows if row.table == name]:
            yield title, found
