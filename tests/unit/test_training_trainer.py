"""The loop: a killed run goes on to the identical weights; the best epoch wins; the loss can be swapped."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from training.recipe import Schedule
from training.sequences import Batch, Example
from training.trainer import STATE, Loss, Trainer, cross_entropy

SCHEDULE = Schedule(epochs=4, batch_size=4, learning_rate=1e-2, warmup=0.2, patience=9, select_by="loss")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads on matrices this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@dataclass
class Batches:
    """Random sequences by epoch; dies in the middle of an epoch when told to."""

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


def equal(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_killed_run_goes_on_to_the_identical_weights(tmp_path: Path, epoch: int) -> None:
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
