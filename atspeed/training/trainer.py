"""The training loop of target and draft, for any batches and any loss on logits.

All randomness depends on (seed, epoch, place in the epoch) only. The state is saved after every epoch and every few minutes
inside one, so a run that was killed or stopped continues to the identical result.

On several GPUs or machines each process takes its share of every step's batches, and DistributedDataParallel averages the
gradients: a step then learns from `batch_size` x `gradient_accumulation` x processes sequences. The main process validates
and writes. `accelerate launch` or torchrun start the processes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from atspeed.engine.files.json_file import finite
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.errors import Paused, RecipeError, TrainingError
from atspeed.training.processes import device, from_main, is_main, mean_and_any, processes, wait_for_all
from atspeed.training.recipe import Schedule
from atspeed.training.sequences import IGNORED, Batch


class Trainable(Protocol):
    """A batch. inputs: arguments of a Hugging Face model that computes in a dtype."""

    def inputs(self, _dtype: torch.dtype, /) -> dict[str, Any]: ...  # noqa: D102 - see the class

    def to(self, device: torch.device) -> Self: ...  # noqa: D102 - see the class


B = TypeVar("B", bound=Trainable)
Loss = Callable[[Tensor, B], Tensor]  # (the logits that the batch's inputs give, the batch) -> a scalar
Validate = Callable[[PreTrainedModel], Mapping[str, float]]  # larger `score` is better; empty without examples
STATE = "state.pt"
BEST = "best"
_FLOOR = 0.05  # the learning rate decays to this share of its peak, a twentieth (recipe.Schedule)
_COMPUTE = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the labelled tokens, each predicted from the position before it.

    logits: float [b, s, V], softmax over the whole vocabulary.
    """
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def batches_per_step(schedule: Schedule) -> int:
    """Return the number of batches of one step, of all processes together."""
    together: int = processes().num_processes
    return together * schedule.gradient_accumulation


@dataclass
class FitState:
    """The progress of a training.

    Attributes:
        epoch: finished epochs.
        best_epoch: the best one, counted from 0; -1 before the first.
        best_score: its validation score.
        log: the measures of each finished epoch.
        batch: finished batches of this epoch, of all processes together.
        loss: the sum of their losses.
    """

    epoch: int = 0
    best_epoch: int = -1
    best_score: float = -math.inf
    log: list[dict[str, float]] = field(default_factory=list)
    batch: int = 0
    loss: float = 0.0

    def finished(self, schedule: Schedule) -> bool:
        """True if all epochs are finished, or the best one is `patience` epochs ago."""
        return self.epoch >= schedule.epochs or self.epoch - 1 - self.best_epoch >= schedule.patience


class _Logits(torch.nn.Module):
    """The model's forward pass, which accelerate wraps. The model itself is unchanged, for validation and saving."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits


@dataclass(frozen=True)
class _Prepared:
    """A model under training.

    Attributes:
        accelerator: accelerate's state for this model.
        forward: maps the inputs of a batch to float32 logits, in the schedule's precision.
        optimizer: the optimizer of its weights.
    """

    accelerator: Accelerator
    forward: torch.nn.Module
    optimizer: torch.optim.Optimizer


@dataclass
class Trainer(Generic[B]):
    """Trains `model` in place.

    Attributes:
        model: the model.
        batches: maps an epoch to its batches.
        loss: the loss on logits and batch.
        validate: the measures of the model. The epoch with the largest `score` is kept.
        schedule: epochs, batch size, learning rate and so on.
        folder: the folder of the run's state, and of the best epoch's checkpoint in folder/best.
        seed: the seed of dropout.
        title: the name in progress lines.
        checkpoints: when to save and stop.
    """

    model: PreTrainedModel
    batches: Callable[[int], Sequence[B]]
    loss: Loss[B]
    validate: Validate
    schedule: Schedule
    folder: Path
    seed: int
    title: str = "model"
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    def fit(self) -> FitState:
        """Train to the end, from the saved state if there is one. The model then has the best epoch's weights.

        Raises Paused, with the state saved, when the checkpoints say so.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        prepared = self._prepare()
        state = self._resume(prepared)
        with self._progress() as progress:
            while not state.finished(self.schedule):
                self._epoch(state, prepared, progress)
        wait_for_all()
        best = type(self.model).from_pretrained(self.folder / BEST)
        self.model.load_state_dict(best.state_dict())
        return state

    def _epoch(self, state: FitState, prepared: _Prepared, progress: Progress) -> None:
        """Train one epoch, validate and save. The best checkpoint is saved first, so a kill between loses nothing."""
        loss = self._pass(state, prepared, progress)
        self._check_weights(state)
        found = {"train_loss": loss} | self._validated()
        measures = finite(found)
        if is_main():
            progress.console.print(
                f"{self.title} epoch {state.epoch + 1}: {_in_words(measures)}", highlight=False, soft_wrap=True
            )
        score = found.get("score", float(state.epoch))  # without examples the newest epoch is the best
        if not math.isfinite(score):
            raise TrainingError(f"{self._place(state)}: the validation score is {score}, so no epoch can be chosen")
        if score > state.best_score:
            state.best_score = score
            state.best_epoch = state.epoch
            self._save_best()
        state.epoch += 1
        state.batch = 0
        state.loss = 0.0
        state.log.append(measures)
        self._save_state(state, prepared)
        if not state.finished(self.schedule):
            self.checkpoints.pause_if_stopping(f"{self.title}: {state.epoch} of {self.schedule.epochs} epochs")

    def _validated(self) -> dict[str, float]:
        """Return the main process's measures, since other GPUs may round differently; in the model's own precision."""
        self.model.train(mode=False)
        with torch.inference_mode():
            return from_main(dict(self.validate(self.model)) if is_main() else {})

    def _check_weights(self, state: FitState) -> None:
        """Raise TrainingError when weights are not finite."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            rate = self.schedule.learning_rate
            raise TrainingError(
                f"{self._place(state)}: weights are not finite; schedule.learning_rate, {rate}, or a setting of the "
                "alignment is too large"
            )

    def _place(self, state: FitState) -> str:
        return f"{self.title} epoch {state.epoch + 1}/{self.schedule.epochs}"

    def _pass(self, state: FitState, prepared: _Prepared, progress: Progress) -> float:
        """Train the remaining batches of an epoch. Returns the mean loss of all of its batches."""
        self.model.train()
        batches = self.batches(state.epoch)
        title = self._place(state)
        if not batches:
            raise RecipeError(
                f"{title}: schedule.item_dropout, {self.schedule.item_dropout}, left no sequence to train on"
            )
        task = progress.add_task(title, total=len(batches), completed=state.batch)
        first, started = state.batch, time.monotonic()
        while state.batch < len(batches):
            stopping = self._step(batches, state, prepared)
            progress.update(task, completed=state.batch)
            if stopping or self.checkpoints.due:
                self._save_state(state, prepared)
            if stopping:
                wait_for_all()
                rate = (state.batch - first) / (time.monotonic() - started)
                raise Paused(f"{title}, batch {state.batch} of {len(batches)}, {rate:.3g} batches/s")
        progress.remove_task(task)
        return state.loss / len(batches)

    def _step(self, batches: Sequence[B], state: FitState, prepared: _Prepared) -> bool:
        """Make one step of the optimizer on the next batches. Returns True if the run is to stop after it."""
        done = (state.epoch + state.batch / len(batches)) / self.schedule.epochs
        for group in prepared.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * _rate(done, self.schedule.warmup)
        together = processes().num_processes
        end = min(state.batch + batches_per_step(self.schedule), len(batches))
        firsts = range(state.batch, end, together)
        self._seed(state)
        total = 0.0
        for first in firsts:
            # All processes make every step. When batches run out, a process repeats one of the epoch's first.
            batch = batches[(first + processes().process_index) % len(batches)].to(device())
            last = first == firsts[-1]
            with nullcontext() if last else prepared.accelerator.no_sync(prepared.forward):
                loss = self.loss(prepared.forward(**batch.inputs(self._compute)), batch) / len(firsts)
                prepared.accelerator.backward(loss)
            total += loss.item()
        prepared.accelerator.clip_grad_norm_(self.model.parameters(), self.schedule.gradient_clip)
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
        mean, stopping = mean_and_any(total, self.checkpoints.stopping)
        if not math.isfinite(mean):
            self._check_weights(state)
        state.loss += mean * (end - state.batch)
        state.batch = end
        return stopping

    def _seed(self, state: FitState) -> None:
        """Seed dropout by the place in the run and the process."""
        entropy = [self.seed, state.epoch, state.batch, processes().process_index]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    @property
    def _compute(self) -> torch.dtype:
        """The dtype of attention."""
        precision = self.schedule.mixed_precision
        return self.model.dtype if precision == "no" else _COMPUTE[precision]

    def _prepare(self) -> _Prepared:
        if self.schedule.mixed_precision == "fp16" and device().type == "cpu":
            raise RecipeError("schedule.mixed_precision: fp16 needs a GPU; bf16 does not")
        # accelerate keeps a process's first precision, but a run trains two models, each with its own.
        AcceleratorState._reset_state()
        processes()  # must exist before accelerate creates its own state
        accelerator = Accelerator(mixed_precision=self.schedule.mixed_precision)
        self.model.to(device())  # type: ignore[arg-type] # transformers wraps the method and loses its self
        return _Prepared(accelerator, *accelerator.prepare(_Logits(self.model), self._optimizer()))

    def _optimizer(self) -> torch.optim.Optimizer:
        """Build AdamW; vectors (norms, biases) have no weight decay."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.schedule.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.schedule.learning_rate, betas=(0.9, 0.98), fused=True)

    def _resume(self, prepared: _Prepared) -> FitState:
        path = self.folder / STATE
        if not path.exists():
            return FitState()
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved["model"])
        prepared.optimizer.load_state_dict(saved["optimizer"])
        if prepared.accelerator.scaler is not None:
            prepared.accelerator.scaler.load_state_dict(saved["scaler"])
        fit = saved["fit"]  # a JSON text in states of older versions
        return FitState(**(json.loads(fit) if isinstance(fit, str) else fit))

    def _save_state(self, state: FitState, prepared: _Prepared) -> None:
        self.checkpoints.saved()
        if not is_main():
            return
        scaler = prepared.accelerator.scaler
        saved = {
            "model": self.model.state_dict(),
            "optimizer": prepared.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "fit": asdict(state),
        }
        temporary = self.folder / f"{STATE}.partial"
        torch.save(saved, temporary)
        temporary.replace(self.folder / STATE)

    def _save_best(self) -> None:
        if not is_main():
            return
        temporary = self.folder / f"{BEST}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        self.model.save_pretrained(temporary)
        shutil.rmtree(self.folder / BEST, ignore_errors=True)
        temporary.rename(self.folder / BEST)

    def _progress(self) -> Progress:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        console = Console()
        return Progress(*columns, console=console, transient=True, disable=not (is_main() and console.is_terminal))


def _rate(progress: float, warmup: float) -> float:
    """Return the share of the peak learning rate at `progress` in [0, 1) of the run."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    decay = (progress - warmup) / (1 - warmup)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * decay))


def _in_words(measures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in measures.items() if name != "score")
