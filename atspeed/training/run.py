"""A run's folders, data and settings, and the stage that trains one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.files.json_file import write_json
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.data import Dataset
from atspeed.training.models import SpelledModel, train_model
from atspeed.training.processes import is_main
from atspeed.training.recipe import ModelRecipe, RunSettings
from atspeed.training.stages import Measures, Stage, key_of, remove


@dataclass(frozen=True)
class Folders:
    """The folders of a run's stages. Compared drafts share some of them; otherwise all are the same.

    Attributes:
        run: the draft, its plan scales, the evaluation, the bundle.
        shared: the catalogue and the target.
        teacher: the teacher's data.
        pretrained: the draft before its alignment, and the target's answers at its beams.
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
class Run:
    """The state that the stages of a run share.

    Attributes:
        settings: the settings of both models.
        folders: the folders of the stages.
        dataset: the data set.
        checkpoints: when to save and stop.
        title: the start of its progress lines.
        last: whether no other run follows.
    """

    settings: RunSettings
    folders: Folders
    dataset: Dataset
    checkpoints: Checkpoints
    title: str = ""
    last: bool = True

    def stage(
        self,
        name: str,
        key: str,
        folder: Path,
        *outputs: str,
        read: Callable[[], object] = lambda: None,
        scratch: tuple[str, ...] = (),
    ) -> Stage:
        """Build a stage with its marker below `folder`. outputs, scratch: paths relative to it."""
        return Stage(
            title=f"{self.title} {name}".lstrip(),
            marker=folder / "stages" / f"{name}.json",
            key=key,
            outputs=tuple(folder / path for path in outputs),
            read=read,
            scratch=tuple(folder / path for path in scratch),
            checkpoints=None if name == "bundle" and self.last else self.checkpoints,
        )

    def model_key(self, part: ModelRecipe, catalogue: Catalogue) -> str:
        """Hash all that a model is trained from, its teacher apart."""
        shared = self.settings.model_dump(mode="json", include=set(RunSettings.model_fields))
        return key_of(
            self.dataset.digest, catalogue.version, shared, part.model_dump(mode="json", exclude={"precision"})
        )

    def model(
        self, name: str, folder: Path, part: ModelRecipe, key: str, catalogue: Catalogue, **objective: Any
    ) -> SpelledModel:
        """Train a model and keep its checkpoint and its log. objective: further arguments of `train_model`."""
        training, checkpoint = folder / f"{name}-training", folder / f"{name}-checkpoint"
        title = f"{self.title} {name}".lstrip()

        def work() -> Measures:
            shared = self.settings, self.dataset, catalogue, training
            model, state = train_model(part, *shared, title=title, checkpoints=self.checkpoints, **objective)
            if is_main():
                remove(checkpoint)
                model.save(checkpoint)
                write_json(folder / f"{name}-log.json", state.log)
            return {"parameters": model.parameters, "epochs": state.epoch, "best_epoch": state.best_epoch + 1}

        read = cache(lambda: SpelledModel.load(checkpoint))
        stage = self.stage(name, key, folder, checkpoint.name, f"{name}-log.json", read=read, scratch=(training.name,))
        stage.run(work, together=True)
        return read()
