"""The stages of a draft: the target's answers, pretraining, alignment, plan scales.

`train` runs them for a target that it has trained, `distill` for the target of a bundle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.training.alignment import AlignmentObjective
from atspeed.training.alignment_batches import AlignmentBatches
from atspeed.training.calibration import Calibration
from atspeed.training.evaluate import AgreementValidation, ModelRecommender, Validation
from atspeed.training.models import SpelledModel
from atspeed.training.processes import device
from atspeed.training.recipe import Alignment, DraftRecipe
from atspeed.training.run import Run
from atspeed.training.sequences import Sequencer, index_histories
from atspeed.training.stages import Measures, key_of
from atspeed.training.teacher import Teacher, TrainingPrompts, check_teacher_data, write_teacher_data
from atspeed.training.trainer import batches_per_step


@dataclass(frozen=True)
class DraftStages:
    """The stages of one draft of a target.

    Attributes:
        run: folders, data and settings.
        part: the draft's part of the recipe.
        catalogue: the catalogue.
        target: loads the target onto the device.
        target_key: the hash of all that the target's answers depend on.
    """

    run: Run
    part: DraftRecipe
    catalogue: Catalogue
    target: Callable[[], ModelRecommender]
    target_key: str

    @property
    def key(self) -> str:
        """The hash of all that the draft is trained from."""
        key = self.run.model_key(self.part, self.catalogue)
        return key if self.part.alignment is None else key_of(key, self._teacher_key(self.part.alignment))

    def _teacher_key(self, alignment: Alignment) -> str:
        """Hash the target and the teacher's settings. The loss is left out, since one teacher serves all losses."""
        own = [self._before_alignment[1]] if alignment.prefixes == "draft" else []
        return key_of(self.target_key, alignment.beams, alignment.prompts, *own)

    def draft(self) -> SpelledModel:
        """Train the draft, after its teacher data if it is aligned."""
        part, run, catalogue = self.part, self.run, self.catalogue
        if part.alignment is None:
            return run.model("draft", run.folders.run, part, self.key, catalogue)
        objective = self.objective(part.alignment, self.teacher(part.alignment))
        start = self.pretrained() if part.pretraining else None
        return run.model("draft", run.folders.run, part, self.key, catalogue, start=start, **objective)

    def objective(self, alignment: Alignment, prompts: TrainingPrompts) -> dict[str, Any]:
        """Return the arguments of `train_model` that align a draft: its seed, loss, batches and validation."""
        part, run, catalogue = self.part, self.run, self.catalogue
        seed = run.settings.seed if part.seed is None else part.seed

        def batches(sequencer: Sequencer) -> AlignmentBatches:
            size, neighbours = part.schedule.batch_size, batches_per_step(part.schedule)
            folder = self._teacher_folder(alignment)
            return AlignmentBatches(folder, prompts, sequencer, catalogue.trie, size, seed, neighbours)

        def validate(validation: Validation) -> AgreementValidation:
            return AgreementValidation.of(validation, self.target(), beams=alignment.beams, width=alignment.budget)

        loss = AlignmentObjective(alignment, run.settings.scoring_rule)
        return {"seed": seed, "loss": loss, "batches": batches, "validate": validate}

    def agreement(self) -> Measures:
        """Return how well the kept epoch of an aligned draft covers the target's beams; empty where nothing was measured."""
        epochs = json.loads((self.run.folders.run / "draft-log.json").read_text())
        best = max(epochs, key=lambda epoch: epoch.get("score", -math.inf))
        return {f"agreement.{name}": best[name] for name in ("accepted", "covered") if name in best}

    def pretrained(self) -> SpelledModel:
        """Train the draft on the histories alone. Every alignment of it begins here."""
        plain, key = self._before_alignment
        folder = self.run.folders.pretrained
        return self.run.model("pretrained-draft", folder, plain, key, self.catalogue, seed=self.part.seed)

    @property
    def _before_alignment(self) -> tuple[DraftRecipe, str]:
        """Return the pretrained draft's part of the recipe, and the hash of all that it is trained from."""
        plain = self.part.model_copy(update={"schedule": self.part.pretraining, "alignment": None, "pretraining": None})
        return plain, self.run.model_key(plain, self.catalogue)

    def _teacher_folder(self, alignment: Alignment) -> Path:
        folders = self.run.folders
        return folders.pretrained / "draft-beams" if alignment.prefixes == "draft" else folders.teacher / "teacher"

    def teacher(self, alignment: Alignment) -> TrainingPrompts:
        """Write the target's answers to training prompts, at its own beams or at the draft's. Returns the prompts."""
        settings, folder = self.run.settings, self._teacher_folder(alignment)
        at_own = self.pretrained() if alignment.prefixes == "draft" else None
        histories = index_histories(self.catalogue, self.run.dataset.train)
        prompts = TrainingPrompts.draw(
            histories, allow_empty=settings.allow_empty_history, limit=alignment.prompts, seed=settings.seed
        )

        def work() -> Measures:
            target = self.target()
            draft = at_own.to(device()).recommender(settings, self.catalogue) if at_own else None
            teacher = Teacher(target.model, target.sequencer, self.catalogue, target.rule, alignment.beams, draft)
            write_teacher_data(teacher, prompts, folder, checkpoints=self.run.checkpoints)
            return {"prompts": len(prompts)}

        key, read = self._teacher_key(alignment), partial(check_teacher_data, folder, len(prompts))
        self.run.stage(folder.name, key, folder.parent, folder.name, read=read).run(work, together=True)
        return prompts

    def plan_scales(self) -> tuple[float, ...]:
        """Choose the plan scales on the validation's users."""
        run, schedule = self.run, self.part.schedule

        def work() -> Measures:
            target = self.target()
            spelled = SpelledModel.load(run.folders.run / "draft-checkpoint").to(device())
            draft = spelled.recommender(run.settings, self.catalogue)
            examples = Validation.of(run.dataset, self.catalogue, draft.sequencer, run.settings, schedule).examples
            scales = Calibration.usual().scales(target, draft, examples)
            return {f"level{level}": scale for level, scale in enumerate(scales, start=1)}

        key = key_of(self.target_key, self.key, schedule.validation_users)
        return tuple(run.stage("plan-scale", key, run.folders.run).run(work).values())
