"""Trains the drafts of a comparison and chooses among the settings of its grids.

All drafts share one target and one teacher and make the same number of steps. Drafts of one shape share the pretrained draft of
a seed; a draft of another shape or kind has one of its own.

A loss may have a grid of settings. Each setting is trained with the first seed, without a bundle. The one whose plans hold the
target's beams of validation users best is then trained with all seeds.

run/                            the folder of the base recipe: catalogue/, target-checkpoint/, teacher/, made if missing
    drafts/
        target/bundle/          the target alone, exported once
        seed1/                  the pretrained draft, from which all losses of a seed start; draft-beams/ if one learns there
        level-kd-seed1/         draft-checkpoint/, draft-log.json, bundle/; its target is a hard link into target/bundle/
        level-kd-weight-0.7-seed1/                          the same of a setting of a grid
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from atspeed.training.checkpoints import Checkpoints
from atspeed.training.comparison import Comparison, Setting, Variant
from atspeed.training.data import Dataset
from atspeed.training.data_check import check_data, check_run_folder, print_skipped_steps
from atspeed.training.errors import RecipeError
from atspeed.training.pipeline import TrainingRun, load_dataset
from atspeed.training.run import Folders
from atspeed.training.stages import Measures
from atspeed.training.workers import train_all


@dataclass(frozen=True)
class Candidate:
    """A setting of a loss, measured on validation users with the first seed.

    Attributes:
        loss: the name of its loss.
        setting: its values of the grid, by key.
        accepted: mean number of leading levels whose target's beams are all among the draft's `budget` nodes; of the best epoch.
        covered: share of the target's beams that are among them, the mean over levels. It breaks ties.
        chosen: whether it is the best of its loss; the first of equals.
    """

    loss: str
    setting: Setting
    accepted: float
    covered: float
    chosen: bool = False


@dataclass(frozen=True)
class TrainedDrafts:
    """The finished drafts of a comparison.

    Attributes:
        bundles: their bundles by LOSS/seedN.
        candidates: what was measured of each setting of a grid.
    """

    bundles: Mapping[str, Path]
    candidates: Sequence[Candidate]


def train_drafts(
    comparison: Comparison,
    run_folder: Path,
    data: Path | None = None,
    *,
    workers: int = 1,
    threads: int | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainedDrafts:
    """Train every draft that is not finished: the grids with the first seed, then what they choose with all seeds.

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
    target = _target(comparison, run_folder, data, dataset, checkpoints)
    build = partial(_run, comparison, target)
    target.bundle()
    if (first := comparison.first_at_target) is not None:
        replace(build(first), title="").teacher()
    tried = comparison.candidates
    train_all([build(variant) for variant in tried], workers, bundled=False)
    candidates = list(_judged((variant, build(variant).align()) for variant in tried))
    chosen = comparison.of_settings({each.loss: each.setting for each in candidates if each.chosen})
    runs = [build(variant) for variant in chosen]
    train_all([*runs[:-1], replace(runs[-1], last=True)], workers)
    bundles = {
        f"{variant.loss}/seed{variant.seed}": run.folders.run / "bundle"
        for variant, run in zip(chosen, runs, strict=True)
    }
    return TrainedDrafts(bundles, candidates)


def _judged(measured: Iterable[tuple[Variant, Measures]]) -> Iterator[Candidate]:
    """Yield the candidates, the best of each loss as chosen. Raises RecipeError where nothing was measured."""
    found: dict[str, list[Candidate]] = {}
    for variant, measures in measured:
        if not measures:
            raise RecipeError("grid: no setting can be chosen without validation users, or with codes of one level")
        accepted, covered = measures["agreement.accepted"], measures["agreement.covered"]
        found.setdefault(variant.loss, []).append(Candidate(variant.loss, variant.setting, accepted, covered))
    for candidates in found.values():
        best = max(candidates, key=lambda candidate: (candidate.accepted, candidate.covered))
        yield from (replace(candidate, chosen=candidate is best) for candidate in candidates)


def _target(
    comparison: Comparison, run_folder: Path, data: Path | None, dataset: Dataset, checkpoints: Checkpoints
) -> TrainingRun:
    """Build the run of the target alone."""
    folder = run_folder / "drafts" / "target"
    folders = Folders(run=folder, shared=run_folder, teacher=run_folder, pretrained=folder)
    alone = comparison.base.model_copy(update={"draft": None})
    return TrainingRun(alone, folders, data, dataset, checkpoints, evaluated=False, last=False)


def _run(comparison: Comparison, target: TrainingRun, variant: Variant) -> TrainingRun:
    """Build the run of a variant. target: the run of the target alone."""
    shared, drafts = target.folders.shared, target.folders.run.parent
    teacher = shared if comparison.same_teacher else drafts
    return replace(
        target,
        recipe=variant.recipe,
        folders=Folders(drafts / variant.name, shared, teacher, drafts / variant.pretrained),
        title=variant.name,
        target_from=target.folders.run / "bundle",
    )
