"""Trains drafts of several losses, kinds and seeds that are otherwise alike.

All drafts share one target and one teacher and make the same number of steps. Drafts of one shape share the pretrained draft of
a seed; a draft of another shape or kind has one of its own.

run/                            the folder of the base recipe: catalogue/, target-checkpoint/, teacher/, made if missing
    drafts/
        target/bundle/          the target alone, exported once
        seed1/                  the pretrained draft, from which all losses of a seed start
        level-kd-seed1/         draft-checkpoint/, draft-log.json, bundle/; its target is a hard link into target/bundle/
        bundles.txt             level-kd/seed1=PATH, ...: the form that `python -m research acceptance --draft` takes

    base = "beauty-small.toml"                              a recipe with a draft, beside this file
    seeds = [1, 2, 3]
    prompts = 20_000                                        optional, instead of the base's
    schedule = { epochs = 2 }                               optional, over the base's [draft.schedule]; so is `pretraining`

    [[losses]]
    name = "level-kd"
    alignment = { loss = "level-kd", weight = 1.0 }         over the base's [draft.alignment]; "none": cross-entropy alone
    draft = { heads = { size = 64 } }                       optional, over the base's [draft]: another shape or kind
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator

from atspeed.engine.files.atomic_write import replace_text
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.data import Dataset
from atspeed.training.data_check import check_data, check_run_folder, print_skipped_steps
from atspeed.training.errors import RecipeError
from atspeed.training.pipeline import TrainingRun, load_dataset
from atspeed.training.processes import is_main
from atspeed.training.recipe import Alignment, DraftRecipe, Recipe, problems, read_recipe, read_toml
from atspeed.training.run import Folders
from atspeed.training.workers import bundle_all

_OF_THE_TEACHER = {"beams", "prompts"}  # keys of the teacher's data, which all losses share
_OF_THE_DRAFT = {"shape", "heads"}  # keys of `[draft]` in which drafts of one comparison may differ
_Place = tuple[int | str, ...]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Loss(_Part):
    """A loss of the comparison.

    Attributes:
        name: its name in folders and in the output.
        alignment: the keys of `[draft.alignment]` that differ from the base recipe's.
        draft: the keys of `[draft]` that differ.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    alignment: dict[str, Any]
    draft: dict[str, Any] = {}

    @field_validator("alignment")
    @classmethod
    def _loss_alone(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "loss" not in values:
            raise ValueError('`loss` is missing; "none" is cross-entropy alone')
        if shared := sorted(_OF_THE_TEACHER & values.keys()):
            raise ValueError(f"{shared[0]}: belongs to the teacher's data, which is the same for all losses")
        return values

    @field_validator("draft")
    @classmethod
    def _shape_or_kind(cls, values: dict[str, Any]) -> dict[str, Any]:
        if other := sorted(values.keys() - _OF_THE_DRAFT):
            raise ValueError(f"{other[0]}: is the same for all drafts; {', '.join(sorted(_OF_THE_DRAFT))} may differ")
        return values


class _Plan(_Part):
    """The comparison file; the module's docstring describes its keys."""

    base: Path
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    prompts: PositiveInt | None = None
    schedule: dict[str, Any] = {}
    pretraining: dict[str, Any] = {}
    losses: Annotated[list[_Loss], Field(min_length=1)]

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed occurs twice")
        return seeds

    @field_validator("losses")
    @classmethod
    def _distinct_names(cls, losses: list[_Loss]) -> list[_Loss]:
        if len({loss.name for loss in losses}) < len(losses):
            raise ValueError("a name occurs twice")
        return losses


@dataclass(frozen=True)
class Variant:
    """One draft: the base recipe with another alignment, shape, kind and seed.

    Attributes:
        loss: the name of its entry in the file.
        seed: its seed.
        recipe: its recipe.
        own_shape: true if its shape or kind is not the base recipe's.
    """

    loss: str
    seed: int
    recipe: Recipe
    own_shape: bool = False

    @property
    def name(self) -> str:
        """The name of its folder and of its progress lines."""
        return f"{self.loss}-seed{self.seed}"

    @property
    def pretrained(self) -> str:
        """The name of the folder of its pretrained draft."""
        return self.name if self.own_shape else f"seed{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """A base recipe and the drafts to train.

    Attributes:
        base: the base recipe.
        variants: all losses and seeds, sorted by loss.
    """

    base: Recipe
    variants: Sequence[Variant]

    @property
    def same_teacher(self) -> bool:
        """True if the base recipe's own draft can use the same teacher data."""
        return _teacher_settings(self.base) in {None, _teacher_settings(self.variants[0].recipe)}


def _teacher_settings(recipe: Recipe) -> tuple[int, int] | None:
    """Return the beams and prompts of a recipe's teacher data, or None without alignment."""
    alignment = recipe.draft.alignment if recipe.draft else None
    return None if alignment is None else (alignment.beams, alignment.prompts)


def read_comparison(path: Path) -> Comparison:
    """Parse and validate a comparison and its base. Raises RecipeError naming the file and the key at fault."""
    plan = read_toml(_Plan, path)
    base = read_recipe(path.parent / plan.base)
    if base.draft is None:
        raise RecipeError(f"{path}: base: {plan.base} has no draft")
    return Comparison(base, tuple(_variants(path, plan, base, base.draft)))


def _variants(path: Path, plan: _Plan, base: Recipe, draft: DraftRecipe) -> Iterator[Variant]:
    if plan.pretraining and draft.pretraining is None:
        raise RecipeError(f"{path}: pretraining: the draft of {plan.base} has none")
    for (index, loss), seed in product(enumerate(plan.losses), plan.seeds):
        try:
            changed = DraftRecipe.model_validate(_draft(plan, loss, seed, draft))
        except ValidationError as error:
            raise RecipeError(f"{path}: {problems(error, partial(_in_file, index, frozenset(loss.draft)))}") from error
        name = f"{base.name}-{loss.name}-seed{seed}"
        yield Variant(loss.name, seed, base.model_copy(update={"name": name, "draft": changed}), bool(loss.draft))


def _in_file(loss: int, of_draft: frozenset[str], place: _Place) -> _Place:
    """Map a key of a draft to its place in the file: the entry of a loss if that sets it, else the top."""
    if place[:1] == ("alignment",):
        return ("losses", loss, *place)
    return ("losses", loss, "draft", *place) if place and place[0] in of_draft else place


def _draft(plan: _Plan, loss: _Loss, seed: int, base: DraftRecipe) -> dict[str, Any]:
    """Build the values of a variant's draft, not validated."""
    values = base.model_dump() | {"seed": seed}
    for name, changes in (("schedule", plan.schedule), ("pretraining", plan.pretraining)):
        if changes:
            values[name] = values[name] | changes
    alignment = (base.alignment or Alignment()).model_dump() | loss.alignment
    if alignment["loss"] == "none":
        alignment["loss"] = None
    if plan.prompts is not None:
        alignment["prompts"] = plan.prompts
    return values | loss.draft | {"alignment": alignment}


def train_drafts(
    comparison: Comparison,
    run_folder: Path,
    data: Path | None = None,
    *,
    workers: int = 1,
    threads: int | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Path]:
    """Train every draft that is not finished. Returns the bundles by LOSS/seedN.

    Args:
        comparison: the drafts to train.
        run_folder: the folder of the base recipe's run, which may be finished or not begun.
        data: the folder that the recipe reads.
        workers: number of processes. Each trains whole drafts on one thread, so the number changes no result.
        threads: CPU threads of the target and the teacher; all cores by default.
        checkpoints: when to save and stop.

    Raises Paused when the checkpoints say so.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    check_run_folder(run_folder)
    dataset = load_dataset(comparison.base, data)
    for recipe in (comparison.base, *(variant.recipe for variant in comparison.variants)):
        check_data(recipe, dataset, data)
    print_skipped_steps(comparison.base, dataset)
    checkpoints = checkpoints or Checkpoints()
    target, runs = _runs(comparison, run_folder, data, dataset, checkpoints)
    target.bundle()
    replace(runs[0], title="").teacher()
    bundle_all(runs, workers)
    found = {
        f"{variant.loss}/seed{variant.seed}": run.folders.run / "bundle"
        for variant, run in zip(comparison.variants, runs, strict=True)
    }
    if is_main():
        lines = [f"{name}={bundle}\n" for name, bundle in found.items()]
        replace_text(run_folder / "drafts" / "bundles.txt", "".join(lines))
    return found


def _runs(
    comparison: Comparison, run_folder: Path, data: Path | None, dataset: Dataset, checkpoints: Checkpoints
) -> tuple[TrainingRun, list[TrainingRun]]:
    """Build the run of the target alone and one run for each variant."""
    drafts = run_folder / "drafts"
    alone = comparison.base.model_copy(update={"draft": None})
    folders = Folders(run=drafts / "target", shared=run_folder, teacher=run_folder, pretrained=drafts / "target")
    target = TrainingRun(alone, folders, data, dataset, checkpoints, evaluated=False, last=False)
    teacher = run_folder if comparison.same_teacher else drafts
    runs = [
        replace(
            target,
            recipe=variant.recipe,
            folders=Folders(drafts / variant.name, run_folder, teacher, drafts / variant.pretrained),
            title=variant.name,
            target_from=drafts / "target" / "bundle",
        )
        for variant in comparison.variants
    ]
    return target, [*runs[:-1], replace(runs[-1], last=True)]
