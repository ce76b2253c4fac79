"""Trains a draft for the target of a bundle and writes a bundle with both.

The target is given. It is loaded to answer prompts, compared with the bundle, and never trained.

run/
    recipe.json                             the recipe with all its values
    teacher/                                the target's answers to training prompts
    pretrained-draft-checkpoint/  draft-checkpoint/
    draft-log.json                          measures per epoch
    stages/*.json                           each stage's key, time and measures
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Provenance
from atspeed.engine.bundle.prompts import texts_of
from atspeed.engine.files.json_file import write_json
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.training.bundles import versions, write_with_draft
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.data import Dataset, Histories
from atspeed.training.data_check import check_loss, check_run_folder
from atspeed.training.draft_stages import DraftStages
from atspeed.training.errors import DataError, RecipeError
from atspeed.training.evaluate import ModelRecommender
from atspeed.training.export_checks import check_origin
from atspeed.training.models import SpelledModel
from atspeed.training.processes import device, is_main
from atspeed.training.recipe import DistillRecipe, PromptWindow, RunSettings
from atspeed.training.run import Folders, Run
from atspeed.training.sequences import Sequencer, Spelling
from atspeed.training.stages import Measures, key_of

_CHECKED_PROMPTS = 5  # prompts on which checkpoint and bundle are compared; other weights differ on each of them
_HELD_SHARE = 5  # one user in so many is held out at most


@dataclass(frozen=True)
class GivenTarget:
    """The target of a bundle and the checkpoint that it was exported from.

    Attributes:
        bundle: the bundle.
        load: loads the checkpoint in float32.
        name: the checkpoint's name in messages.
        digest: the hash of the checkpoint.
    """

    bundle: Bundle
    load: Callable[[], PreTrainedModel]
    name: str
    digest: str

    @property
    def spelling(self) -> Spelling:
        """The tokens of the bundle's prompts and codes."""
        entry = self.bundle.model("target")
        return Spelling(code_tokens=entry.code_tokens, prompt=entry.prompt, pad_token=0, vocab_size=entry.vocab_size)

    @property
    def answers_key(self) -> str:
        """The hash of all that the checkpoint's answers depend on: not of the number format of the bundle's target.

        So bundles of one checkpoint in several formats share the draft of a run folder.
        """
        manifest = self.bundle.manifest
        tokens = manifest.target.model_dump(mode="json", include={"code_tokens", "prompt", "vocab_size"})
        return key_of(self.digest, manifest.scoring_rule, manifest.catalogue_version, tokens)

    def check(self, sequencer: Sequencer, examples: Dataset, catalogue: Catalogue) -> Measures:
        """Raise EngineError for a damaged bundle, and ExportError when the checkpoint is another one."""
        verify_bundle(self.bundle.root, passes=False)
        longest = sorted(examples.train.values(), key=len)[-_CHECKED_PROMPTS:]
        prompts = [sequencer.prompt(catalogue.find(history)) for history in longest]
        error = check_origin(self.load(), self.name, self.bundle, "target", prompts)
        return {"largest logit error": error}


def distill(
    target: GivenTarget,
    histories: Histories,
    recipe: DistillRecipe,
    out: Path,
    run_folder: Path,
    *,
    source: str,
    threads: int | None = None,
    checkpoints: Checkpoints | None = None,
) -> Path:
    """Run every stage that is not finished. Returns the new bundle's folder. A run that was killed or paused is continued.

    Args:
        target: the target.
        histories: items of the catalogue by user, oldest first.
        recipe: the draft's recipe.
        out: the folder of the new bundle.
        run_folder: the folder of the run.
        source: the name of the histories.
        threads: CPU threads, all cores by default.
        checkpoints: when to save and stop.

    Raises Paused when the checkpoints say so.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    disable_progress_bar()  # type: ignore[no-untyped-call] # transformers' own, one per checkpoint
    _check_folders(target.bundle, out, run_folder)
    manifest = target.bundle.manifest
    if manifest.target.inflated_from is not None:
        raise RecipeError(f"{target.bundle.root}: its target is inflated; distil from the bundle that was trained")
    prompt = manifest.target.prompt
    settings = RunSettings(
        seed=recipe.seed,
        scoring_rule=manifest.scoring_rule,
        allow_empty_history=manifest.allow_empty_history,
        prompt=recipe.prompt or PromptWindow(max_items=prompt.max_items, drop_block=prompt.drop_block),
    )
    dataset = split(histories, source, settings, held=recipe.draft.schedule.validation_users)
    catalogue = target.bundle.catalogue()
    check_loss(recipe.draft, catalogue.trie.levels)
    run_folder.mkdir(parents=True, exist_ok=True)
    run = Run(settings, Folders.one(run_folder), dataset, checkpoints or Checkpoints())
    return Distillation(run, target, recipe, catalogue, out).bundle()


def split(histories: Histories, source: str, settings: RunSettings, *, held: int) -> Dataset:
    """Hold out the last item of some users, for the choice of the epoch and of the plan scales.

    A history that begins another one adds no prompt and is left out. Raises DataError when there is nothing to learn from.
    """
    ordered = sorted(histories.items(), key=lambda user: user[1])
    longer = [*(history for _, history in ordered[1:]), ()]
    kept = {
        user: history
        for (user, history), after in zip(ordered, longer, strict=True)
        if after[: len(history)] != history
    }
    shortest = 1 if settings.allow_empty_history else 2
    train = {user: history for user, history in kept.items() if len(history) >= shortest}
    if not train:
        raise DataError(f"{source}: no user has {shortest} items or more, so there is nothing to learn from")
    long = sorted(user for user, history in train.items() if len(history) > shortest)
    count = min(held, -(-len(train) // _HELD_SHARE), len(long))
    chosen = [long[index] for index in np.random.default_rng(settings.seed).permutation(len(long))[:count]]
    valid = {user: train[user][-1:] for user in chosen}
    train |= {user: train[user][:-1] for user in chosen}
    return Dataset(name=source, terms="", items=(), train=train, valid=valid, test={})


def _check_folders(bundle: Bundle, out: Path, run_folder: Path) -> None:
    """Raise RecipeError when a run would write into a bundle, or replace what it did not write."""
    check_run_folder(run_folder)
    check_run_folder(out.parent)
    if run_folder.resolve().is_relative_to(out.resolve()):
        raise RecipeError(f"{run_folder}: inside the new bundle {out}; give another run folder")
    if bundle.root.resolve().is_relative_to(out.resolve()):
        raise RecipeError(f"{out}: would replace {bundle.root}; give another folder")
    if out.exists() and not (run_folder / "stages" / "bundle.json").exists():
        raise RecipeError(f"{out}: exists, and is no bundle of the run {run_folder}; give another folder")


@dataclass(frozen=True)
class Distillation:
    """The stages of a distillation.

    Attributes:
        run: folders, data and settings.
        target: the target.
        recipe: the draft's recipe.
        catalogue: the bundle's catalogue.
        out: the folder of the new bundle.
    """

    run: Run
    target: GivenTarget
    recipe: DistillRecipe
    catalogue: Catalogue
    out: Path

    def bundle(self) -> Path:
        """Run every stage that is not finished. Returns the new bundle's folder."""
        if is_main():
            write_json(self.run.folders.run / "recipe.json", self.recipe.model_dump(mode="json"))
        spelled = self.target.spelling
        texts = texts_of(self.target.bundle, "target")
        sequencer = Sequencer.of(spelled, self.catalogue, self.run.settings.allow_empty_history, texts)
        target_key = key_of(self.target.bundle.manifest.model_version("target"), self.target.digest)
        asked = key_of(self.target.answers_key, self.run.dataset.digest, self.run.settings.model_dump(mode="json"))
        stages = DraftStages(
            self.run,
            self.recipe.draft,
            self.catalogue,
            target=partial(self._recommender, sequencer),
            target_key=asked,
        )
        self.run.stage("target", target_key, self.run.folders.run).run(
            partial(self.target.check, sequencer, self.run.dataset, self.catalogue)
        )
        draft = stages.draft()
        return self._bundle(draft, stages.agreement(), stages.plan_scales(), stages.key)

    def _recommender(self, sequencer: Sequencer) -> ModelRecommender:
        """Load the target onto the device. It reads the prompts of the bundle."""
        model = SpelledModel(self.target.load(), sequencer.spelling).to(device()).model
        return ModelRecommender(model, sequencer, self.catalogue, self.run.settings.scoring_rule)

    def _bundle(self, draft: SpelledModel, measures: Measures, scales: tuple[float, ...], key: str) -> Path:
        source, part = self.target.bundle, self.recipe.draft

        def work() -> Measures:
            provenance = self._provenance(source.manifest.provenance, measures)
            write_with_draft(self.out, source, draft, part.precision, scales, provenance=provenance)
            return measures

        key = key_of(source.manifest.version, key, part.precision, list(scales))
        read = partial(verify_bundle, self.out, passes=False)
        where = str(self.out.absolute())
        self.run.stage("bundle", key, self.run.folders.run, where, read=read).run(work)
        return self.out

    def _provenance(self, given: Provenance, measures: Mapping[str, float]) -> Provenance:
        """Return the target's origin with the draft's."""
        data = self.run.dataset
        return given.model_copy(
            update={
                "draft": f"{self.recipe.model_dump_json()} on {data.name} ({data.digest})",
                "versions": versions(),
                "metrics": given.metrics | {name: round(value, 6) for name, value in measures.items()},
            }
        )
