"""The one training loop, for target and draft: a model, batches per epoch, and a loss on logits that can be swapped.

Everything random depends on (seed, epoch) only and the state is saved after every epoch, so a run that was killed
goes on to the identical result.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from training.recipe import Schedule
from training.sequences import IGNORED, Batch


class Trainable(Protocol):
    """What one step is made on. inputs: arguments of a Hugging Face model with weights of a dtype."""

    def inputs(self, _dtype: torch.dtype, /) -> dict[str, Any]: ...  # noqa: D102 - see the class

    def to(self, device: torch.device) -> Self: ...  # noqa: D102 - see the class


B = TypeVar("B", bound=Trainable)
Loss = Callable[[Tensor, B], Tensor]  # (the logits that the batch's inputs give, the batch) -> a scalar
Validate = Callable[[PreTrainedModel], Mapping[str, float]]  # larger `score` is better
STATE = "state.pt"
BEST = "best"
_FLOOR = 0.05  # the learning rate decays to this share of its peak


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the labelled tokens, each predicted from the position before it.

    logits: float [b, s, V], softmax over the whole vocabulary.
    """
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class FitState:
    """Where a run stands. log: one dict of measures per finished epoch."""

    epoch: int = 0
    best_epoch: int = -1
    best_score: float = -math.inf
    log: list[dict[str, float]] = field(default_factory=list)

    def finished(self, schedule: Schedule) -> bool:
        """Whether all epochs are done or the best one is too long ago."""
        return self.epoch >= schedule.epochs or self.epoch - 1 - self.best_epoch >= schedule.patience


@dataclass
class Trainer(Generic[B]):
    """Trains `model` in place. folder: keeps the state of the run, and the best epoch's checkpoint in folder/best.

    batches: epoch -> its batches. validate: measures of the model as it stands; that with the largest `score` is kept.
    """

    model: PreTrainedModel
    batches: Callable[[int], Sequence[B]]
    loss: Loss[B]
    validate: Validate
    schedule: Schedule
    folder: Path
    seed: int
    title: str = "model"

    def fit(self) -> FitState:
        """Train until done, from the saved state if there is one; the model ends up with the best epoch's weights."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model.to(device())  # type: ignore[arg-type] # transformers wraps the method and loses its self
        optimizer = self._optimizer()
        state = self._resume(optimizer)
        with self._progress() as progress:
            while not state.finished(self.schedule):
                self._epoch(state, optimizer, progress)
        best = type(self.model).from_pretrained(self.folder / BEST)
        self.model.load_state_dict(best.state_dict())
        return state

    def _epoch(self, state: FitState, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """One epoch, its validation, its state on disk; the best checkpoint first, so a kill between loses nothing."""
        measures = {"train_loss": self._pass(state.epoch, optimizer, progress)}
        self.model.train(mode=False)
        with torch.inference_mode():
            measures |= self.validate(self.model)
        progress.console.print(f"{self.title} epoch {state.epoch + 1}: {_in_words(measures)}", highlight=False)
        if measures["score"] > state.best_score:
            state.best_score, state.best_epoch = measures["score"], state.epoch
            self._save_best()
        state.epoch += 1
        state.log.append(measures)
        self._save_state(state, optimizer)

    def _pass(self, epoch: int, optimizer: torch.optim.Optimizer, progress: Progress) -> float:
        """All batches of an epoch once; the mean loss."""
        torch.manual_seed(self.seed * 1_000_003 + epoch)  # dropout
        self.model.train()
        batches = self.batches(epoch)
        task = progress.add_task(f"{self.title} epoch {epoch + 1}/{self.schedule.epochs}", total=len(batches))
        total = 0.0
        for step, batch in enumerate(batches):
            done = (epoch + step / len(batches)) / self.schedule.epochs
            total += self._step(batch, optimizer, self.schedule.learning_rate * _rate(done, self.schedule.warmup))
            progress.advance(task)
        progress.remove_task(task)
        return total / len(batches)

    def _step(self, batch: B, optimizer: torch.optim.Optimizer, rate: float) -> float:
        batch = batch.to(device())
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.model(**batch.inputs(self.model.dtype), use_cache=False).logits, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.gradient_clip)
        optimizer.step()
        return loss.item()

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW; vectors (norms, biases) are not decayed."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.schedule.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.schedule.learning_rate, betas=(0.9, 0.98))

    def _resume(self, optimizer: torch.optim.Optimizer) -> FitState:
        path = self.folder / STATE
        if not path.exists():
            return FitState()
        saved = torch.load(path, map_location=device(), weights_only=True)
        self.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return FitState(**json.loads(saved["fit"]))

    def _save_state(self, state: FitState, optimizer: torch.optim.Optimizer) -> None:
        temporary = self.folder / f"{STATE}.partial"
        fit = json.dumps(asdict(state))
        saved = {"model": self.model.state_dict(), "optimizer": optimizer.state_dict(), "fit": fit}
        torch.save(saved, temporary)
        temporary.replace(self.folder / STATE)

    def _save_best(self) -> None:
        temporary = self.folder / f"{BEST}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        self.model.save_pretrained(temporary)
        shutil.rmtree(self.folder / BEST, ignore_errors=True)
        temporary.rename(self.folder / BEST)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True
        )


def _rate(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1) of the run."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    decay = (progress - warmup) / (1 - warmup)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * decay))


def _in_words(measures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in measures.items() if name != "score")
