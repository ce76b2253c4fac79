"""The loop: a killed or paused run continues to the identical weights; the best epoch wins; the loss can be swapped."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from atspeed.training.checkpoints import Checkpoints
from atspeed.training.errors import Paused, RecipeError, TrainingError
from atspeed.training.recipe import Schedule
from atspeed.training.sequences import Batch, Example
from atspeed.training.trainer import STATE, Loss, Trainer, cross_entropy

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SCHEDULE = Schedule(epochs=4, batch_size=4, learning_rate=1e-2, warmup=0.2, patience=9, select_by="loss")


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@dataclass
class Batches:
    """Random sequences by epoch, with an error in the middle of an epoch if asked for."""

    die_in: int | None = None

    def __call__(self, epoch: int) -> Sequence[Batch]:
        rng = np.random.default_rng(epoch)
        made = [Batch.of([_example(rng) for _ in range(4)], 0) for _ in range(3)]
        if epoch == self.die_in:
            made[1] = Dying(made[1].tokens, made[1].labels)
        return made


class Dying(Batch):
    def to(self, device: torch.device) -> Batch:  # type: ignore[override]
        raise Killed


def _example(rng: np.random.Generator) -> Example:
    tokens = rng.integers(1, 20, size=int(rng.integers(3, 9)))
    return Example(tokens, tokens)


def model() -> PreTrainedModel:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.3,
    )
    return LlamaForCausalLM(config)


def weight_norm(trained: PreTrainedModel) -> Mapping[str, float]:
    return {"score": sum(parameter.detach().square().sum().item() for parameter in trained.parameters())}


def trainer(folder: Path, batches: Batches | None = None, loss: Loss[Batch] = cross_entropy) -> Trainer[Batch]:
    return Trainer(model(), batches or Batches(), loss, weight_norm, SCHEDULE, folder, seed=3)


def test_a_state_of_an_older_version_is_resumed(tmp_path: Path) -> None:
    """It held the progress as JSON."""
    with pytest.raises(Killed):
        trainer(tmp_path, Batches(die_in=1)).fit()
    saved = torch.load(tmp_path / STATE, weights_only=True)
    torch.save(saved | {"fit": json.dumps(saved["fit"])}, tmp_path / STATE)
    state = trainer(tmp_path).fit()
    assert len(state.log) == SCHEDULE.epochs


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_validation_score_that_is_not_finite_ends_the_run(score: float, tmp_path: Path) -> None:
    """No epoch would ever be the best, and the best one's checkpoint not there."""
    made = replace(trainer(tmp_path), validate=lambda _: {"score": score})
    with pytest.raises(TrainingError, match=r"model epoch 1/4: the validation score is"):
        made.fit()


def test_measure_that_is_not_finite_is_not_logged(tmp_path: Path) -> None:
    made = replace(trainer(tmp_path), validate=lambda _: {"score": 1.0, "loss": float("inf"), "recall": 0.5})
    assert all(log.keys() == {"train_loss", "score", "recall"} for log in made.fit().log)


def test_without_a_validation_the_last_epoch_is_kept(tmp_path: Path) -> None:
    """The patience of the schedule has no effect."""
    state = with_schedule(replace(trainer(tmp_path), validate=lambda _: {}), patience=1).fit()
    assert (state.epoch, state.best_epoch) == (SCHEDULE.epochs, SCHEDULE.epochs - 1)
    assert all(log.keys() == {"train_loss"} for log in state.log)


def with_schedule(made: Trainer[Batch], **changes: object) -> Trainer[Batch]:
    return replace(made, schedule=made.schedule.model_copy(update=changes))


@dataclass
class StopAfter(Checkpoints):
    """Stops at the first step or epoch that asks for the `steps`th time, counted from 1."""

    steps: int = 1
    asked: int = field(default=0)

    @property
    def stopping(self) -> bool:
        self.asked += 1
        return self.asked >= self.steps


def equal(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_killed_run_is_resumed_to_identical_weights(tmp_path: Path, epoch: int) -> None:
    """Killed in the middle of an epoch, with dropout, a warm-up and momentum under way."""
    whole = trainer(tmp_path / "whole")
    expected = whole.fit()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", Batches(die_in=epoch)).fit()
    resumed = trainer(tmp_path / "killed")
    assert resumed.fit() == expected
    assert equal(whole.model, resumed.model)


def test_a_kill_between_the_best_checkpoint_and_the_state_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "whole")
    expected = whole.fit()
    killed = trainer(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_state", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            killed.fit()
    assert not (tmp_path / "killed" / STATE).exists()
    resumed = trainer(tmp_path / "killed")
    assert resumed.fit() == expected
    assert equal(whole.model, resumed.model)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation": 2}, {"mixed_precision": "bf16"}])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_paused_run_is_resumed_to_identical_weights(tmp_path: Path, steps: int, changes: dict[str, object]) -> None:
    """Paused again and again inside epochs, with dropout, a warm-up and momentum under way; at least a step each time."""
    whole = with_schedule(trainer(tmp_path / "whole"), **changes)
    expected = whole.fit()
    pauses = 0
    while True:
        resumed = with_schedule(trainer(tmp_path / "paused"), **changes)
        resumed = replace(resumed, checkpoints=StopAfter(steps=steps))
        try:
            state = resumed.fit()
        except Paused:
            pauses += 1
        else:
            break
    assert pauses >= (2 if steps == 5 else 4)
    assert state == expected
    assert equal(whole.model, resumed.model)


def test_a_kill_between_checkpoints_inside_an_epoch_loses_nothing(tmp_path: Path) -> None:
    """The state is saved after every step; the third batch of the second epoch kills the run."""
    whole = trainer(tmp_path / "whole")
    expected = whole.fit()
    with pytest.raises(Killed):
        replace(trainer(tmp_path / "killed", Batches(die_in=1)), checkpoints=Checkpoints(minutes=0)).fit()
    saved = torch.load(tmp_path / "killed" / STATE, weights_only=True)
    assert saved["fit"]["epoch"] == 1
    assert saved["fit"]["batch"] == 1
    resumed = trainer(tmp_path / "killed")
    assert resumed.fit() == expected
    assert equal(whole.model, resumed.model)


def test_run_past_its_time_limit_still_makes_progress(tmp_path: Path) -> None:
    with pytest.raises(Paused, match=r"model epoch 1/4, batch 1 of 3, .* batches/s"):
        replace(trainer(tmp_path), checkpoints=Checkpoints.within(0, 5)).fit()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_the_next_step(tmp_path: Path, number: signal.Signals) -> None:
    """The handlers are afterwards those of before."""
    before = signal.getsignal(number)
    checkpoints = Checkpoints()

    def signalled(logits: Tensor, batch: Batch) -> Tensor:
        os.kill(os.getpid(), number)
        return cross_entropy(logits, batch)

    with checkpoints.stop_at_signals(), pytest.raises(Paused, match="batch 1 of 3"):
        replace(trainer(tmp_path, loss=signalled), checkpoints=checkpoints).fit()
    assert signal.getsignal(number) is before


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path: Path) -> None:
    """Sequences of one length and no dropout: the mean of two batches' losses is the loss of both together."""
    rng = np.random.default_rng(5)
    examples = [Example(tokens, tokens) for tokens in rng.integers(1, 20, size=(8, 6))]

    def weights(name: str, batches: list[Batch], accumulated: int) -> PreTrainedModel:
        made = with_schedule(trainer(tmp_path / name), epochs=1, gradient_accumulation=accumulated)
        made.model.config.attention_dropout = 0.0
        for layer in made.model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        replace(made, batches=lambda _: batches).fit()
        return made.model

    halves = weights("halves", [Batch.of(examples[:4], 0), Batch.of(examples[4:], 0)], 2)
    whole = weights("whole", [Batch.of(examples, 0)], 1)
    for first, second in zip(halves.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-6)


def test_half_precision_trains_float32_weights(tmp_path: Path) -> None:
    """The passes are computed in bfloat16; weights, the loss's logits and the validation stay float32."""
    seen: set[torch.dtype] = set()

    def noted(logits: Tensor, batch: Batch) -> Tensor:
        seen.add(logits.dtype)
        return cross_entropy(logits, batch)

    def validate(trained: PreTrainedModel) -> Mapping[str, float]:
        seen.add(trained(input_ids=torch.ones((1, 2), dtype=torch.int64)).logits.dtype)
        return weight_norm(trained)

    half = with_schedule(replace(trainer(tmp_path / "half", loss=noted), validate=validate), mixed_precision="bf16")
    state = half.fit()
    full = trainer(tmp_path / "full")
    expected = full.fit()
    assert seen == {torch.float32}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert not equal(half.model, full.model)
    assert state.log[-1]["train_loss"] == pytest.approx(expected.log[-1]["train_loss"], rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_fp16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"schedule\.mixed_precision: fp16"):
        with_schedule(trainer(tmp_path), mixed_precision="fp16").fit()


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    state = first.fit()
    again = trainer(tmp_path, Batches(die_in=state.epoch))
    assert again.fit() == state
    assert equal(first.model, again.model)


def test_the_best_epoch_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0, 2.0])
    norms: list[float] = []

    def validate(trained: PreTrainedModel) -> Mapping[str, float]:
        norms.append(weight_norm(trained)["score"])
        return {"score": next(scores)}

    made = replace(
        trainer(tmp_path), validate=validate, schedule=SCHEDULE.model_copy(update={"patience": 2, "epochs": 9})
    )
    state = made.fit()
    assert (state.epoch, state.best_epoch, state.best_score) == (4, 1, 3.0)
    assert weight_norm(made.model)["score"] == pytest.approx(norms[1])


def test_the_loss_can_be_swapped(tmp_path: Path) -> None:
    """A loss gets the logits of every position and the batch; here it makes one token likely everywhere."""

    def only_token_five(logits: Tensor, batch: Batch) -> Tensor:
        assert logits.shape == (*batch.tokens.shape, 20)
        return -logits.log_softmax(-1)[..., 5].mean()

    made = trainer(tmp_path, loss=only_token_five)
    state = made.fit()
    assert state.log[-1]["train_loss"] < state.log[0]["train_loss"]


def test_cross_entropy_by_hand() -> None:
    """Two labelled tokens, each read off the position before it; padding does not count."""
    logits = torch.zeros(1, 4, 3)
    logits[0, 0, 2] = 1.0
    tokens = torch.tensor([[1, 2, 1, 0]])
    batch = Batch(tokens, torch.tensor([[-100, 2, 1, -100]]))
    expected = (np.log(np.e + 2) - 1 + np.log(3)) / 2
    assert cross_entropy(logits, batch).item() == pytest.approx(expected, abs=1e-6)
