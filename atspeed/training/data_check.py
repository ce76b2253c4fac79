"""Checks that the data can train a recipe, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from atspeed.engine.bundle.manifest import MANIFEST
from atspeed.training.data import Dataset, SplitName
from atspeed.training.errors import DataError, RecipeError
from atspeed.training.processes import is_main
from atspeed.training.recipe import DraftRecipe, QuantisedCodes, Recipe
from atspeed.training.semantic_ids import given_codes


def check_run_folder(run_folder: Path) -> None:
    """Raise RecipeError if a run would write into a bundle, which could then no longer be verified."""
    folder = run_folder.resolve()
    for place in (folder, *folder.parents):
        if (place / MANIFEST).exists():
            raise RecipeError(f"{run_folder}: inside the bundle {place}; give another run folder")


def check_data(recipe: Recipe, dataset: Dataset, data: Path | None) -> None:
    """Raise DataError or RecipeError if the data cannot train the recipe. data: the folder that it was read from."""
    if not dataset.items:
        raise DataError(f"{dataset.name}: items: there are none")
    shortest = 1 if recipe.allow_empty_history else 2
    if not any(len(history) >= shortest for history in dataset.train.values()):
        raise DataError(
            f"{dataset.name}: train: no user has {shortest} items or more, so there is nothing to learn from"
        )
    if isinstance(recipe.codes, QuantisedCodes):
        _check_quantised(recipe.codes, dataset)
        levels = recipe.codes.levels
    else:
        levels = given_codes(dataset, recipe.codes, data).shape[1]
    if recipe.draft is not None:
        check_loss(recipe.draft, levels)


def check_loss(draft: DraftRecipe, levels: int) -> None:
    """Raise RecipeError if the loss of a draft has nothing to compare. levels: L, of the code paths."""
    if levels == 1 and draft.alignment is not None and draft.alignment.loss == "coverage":
        raise RecipeError("draft.alignment.loss: coverage needs planned levels, and code paths of one level have none")


def print_skipped_steps(recipe: Recipe, dataset: Dataset) -> None:
    """Print the consequences of empty splits for the run."""
    if is_main():
        for note in _notes(recipe, dataset):
            Console(stderr=True).print(note, highlight=False, markup=False, soft_wrap=True)


def _check_quantised(codes: QuantisedCodes, dataset: Dataset) -> None:
    """Refuse data that the factorisation or the quantiser cannot process."""
    if len(dataset.items) < 1 << codes.codebook_bits:
        raise RecipeError(
            f"codes.codebook_bits: {1 << codes.codebook_bits} codes per level for only {len(dataset.items)} items"
        )
    if codes.text_weight < 1 and all(len(set(items)) < 2 for items in dataset.train.values()):
        raise RecipeError(
            f"codes.text_weight: {codes.text_weight} needs a train history with two different items; 1 uses texts alone"
        )


def _notes(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    """Yield a line for each split without an evaluation case."""
    undone: dict[SplitName, str] = {
        "valid": "no epoch is chosen: every model is trained for all its epochs, and the last one is kept",
        "test": "nothing is measured",
    }
    for split, consequence in undone.items():
        cases = dataset.cases(split)
        if not any(case.targets and (case.history or recipe.allow_empty_history) for case in cases):
            yield f"{dataset.name}: {split}: no user with items to ask about, so {consequence}"
