"""Evaluates a run on the test split, beside popularity and item-kNN."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Role
from atspeed.training import evaluate
from atspeed.training.data import Dataset
from atspeed.training.models import SpelledModel
from atspeed.training.recipe import Recipe
from atspeed.training.stages import Measures

_DRAFT_WIDTH = 40  # N of the agreement measure, the AtSpeed paper's
_TARGET_BEAMS = 10  # K of the agreement measure


def evaluate_models(
    recipe: Recipe, dataset: Dataset, catalogue: Catalogue, models: Mapping[Role, SpelledModel]
) -> dict[str, dict[str, Measures]]:
    """Return measures on the test split by table and method: `test`, `test-unseen` (seen items left out), `agreement`.

    All methods learn from the train split. `item-knn-refitted` also counts the validation split, like a baseline that is
    rebuilt daily. The report is empty if the split has no case.
    """
    examples = evaluate.eval_examples(
        dataset.cases("test"),
        catalogue,
        allow_empty=recipe.allow_empty_history,
        limit=recipe.evaluation_users,
        seed=recipe.seed,
    )
    if not examples:
        return {}
    recommenders = {role: model.recommender(recipe, catalogue) for role, model in models.items()}
    baselines = {
        "popularity": evaluate.popularity(dataset, catalogue),
        "item-knn": evaluate.item_knn(dataset, catalogue, recent=recipe.prompt.max_items),
        "item-knn-refitted": evaluate.item_knn(dataset, catalogue, recent=recipe.prompt.max_items, before="test"),
    }
    report: dict[str, dict[str, Measures]] = {}
    for protocol, exclude_seen in (("test", False), ("test-unseen", True)):
        found: dict[str, list[evaluate.Ranking]] = {}
        for role, model_recommender in recommenders.items():
            found[role] = model_recommender.rank(examples, exclude_seen=exclude_seen)
        for name, scorer in baselines.items():
            found[name] = evaluate.rank_by(scorer, examples, exclude_seen=exclude_seen)
        report[protocol] = {name: evaluate.metrics(rankings, examples) for name, rankings in found.items()}
    if "draft" in recommenders:
        beams = (
            recommenders["target"].beams(examples, beams=_TARGET_BEAMS),
            recommenders["draft"].beams(examples, beams=_DRAFT_WIDTH),
        )
        report["agreement"] = {"draft": evaluate.agreement(*beams)}
    return report


def flat(report: Mapping[str, Mapping[str, Measures]]) -> Measures:
    """Flatten a report for the manifest: `row.column` -> value."""
    rows = dict(report.get("test", {})) | {"agreement": report.get("agreement", {}).get("draft", {})}
    return {f"{row}.{name}": value for row, measured in rows.items() for name, value in measured.items()}


def show(report: Mapping[str, Mapping[str, Measures]]) -> None:
    """Print an evaluation, one table per protocol."""
    console = Console()
    for title, rows in report.items():
        console.print(evaluate.table(title, rows))
