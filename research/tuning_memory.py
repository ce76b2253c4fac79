"""Memory, steps and held-out loss of ways to tune a pretrained language model, at equal processor time.

The model learns histories as text: a sequence lists the titles of a user's items. So it begins near its task, without new tokens.
Every method gets a process of its own, the same batches in the same order and the same processor time. Its peak memory is the
largest resident set of that process (VmHWM) from the first step on, so the loading of the weights does not count.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from atspeed.benchmarks.intervals import Interval, bootstrap
from atspeed.benchmarks.results import Columns
from atspeed.training.sequences import IGNORED
from research.subzero import SubZero

NAME = "tuning-memory"
_PROMPT = "Bought in this order:"
_LORA = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


class Method(StrEnum):
    """Ways to tune. `lora-recomputed` computes a layer's activations again in the backward pass, and keeps none."""

    ADAMW = "adamw"
    LORA = "lora"
    LORA_RECOMPUTED = "lora-recomputed"
    SUBZERO = "subzero"


LEARNING_RATES = {Method.ADAMW: 5e-5, Method.LORA: 5e-4, Method.LORA_RECOMPUTED: 5e-4, Method.SUBZERO: 1e-4}


@dataclass(frozen=True)
class TuningConfig:
    """Configuration of the study.

    Attributes:
        minutes: processor time of each method's steps. At least one step is made.
        batch: sequences of a step.
        tokens: most tokens of a sequence.
        held: histories that teach nothing.
        rates: learning rate of each method.
    """

    minutes: float = 8
    batch: int = 4
    tokens: int = 128
    held: int = 64
    seed: int = 1
    threads: int = 1
    rates: tuple[tuple[Method, float], ...] = tuple(LEARNING_RATES.items())


@dataclass(frozen=True)
class TuningRow:
    """A method.

    Attributes:
        trainable: parameters that it changes.
        optimizer_bytes: what its optimizer keeps between steps.
        resident_bytes: the resident set before the first step: the weights and the libraries.
        peak_bytes: the largest resident set since then.
        seconds: processor time of the steps.
        start: held-out loss in nats per token before the first step.
        end: the same after the last one.
        change: its difference, mean over the held-out histories with a 95 % interval.
    """

    method: Method
    learning_rate: float
    trainable: int
    optimizer_bytes: int
    resident_bytes: int
    peak_bytes: int
    steps: int
    seconds: float
    start: float
    end: float
    change: Interval


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


COLUMNS: Columns[TuningRow] = (
    ("", lambda row: row.method),
    ("rate", lambda row: f"{row.learning_rate:g}"),
    ("trainable", lambda row: f"{row.trainable:,}"),
    ("optimizer MB", lambda row: f"{row.optimizer_bytes / 1e6:,.0f}"),
    ("before GiB", lambda row: _gib(row.resident_bytes)),
    ("peak GiB", lambda row: _gib(row.peak_bytes)),
    ("steps", lambda row: str(row.steps)),
    ("CPU s", lambda row: f"{row.seconds:.0f}"),
    ("loss before", lambda row: f"{row.start:.3f}"),
    ("after", lambda row: f"{row.end:.3f}"),
    ("change", lambda row: f"{row.change.value:+.4f} [{row.change.low:+.4f}, {row.change.high:+.4f}]"),
)


def read_sequences(base: Path, histories: Path, titles: Path, tokens: int) -> list[list[int]]:
    """Return the tokens of every history, as the titles of its items in order."""
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(base)
    names = json.loads(titles.read_text(encoding="utf-8"))
    read = [json.loads(line)["items"] for line in histories.read_text(encoding="utf-8").splitlines()]
    texts = [f"{_PROMPT}\n" + "".join(f"- {names[item]}\n" for item in items) for items in read]
    return [tokenizer(text)["input_ids"][:tokens] for text in texts]


def endless_batches(sequences: Sequence[list[int]], size: int, seed: int) -> Iterator[Sequence[list[int]]]:
    """Yield batches without an end. Each pass over the sequences has an order of its own."""
    order, generator = list(sequences), random.Random(seed)  # noqa: S311 - an order is no secret
    while True:
        generator.shuffle(order)
        yield from (order[at : at + size] for at in range(0, len(order) - size + 1, size))


def losses(model: Any, batch: Sequence[list[int]]) -> Tensor:
    """Return the mean loss of every sequence in nats per token, [b]."""
    longest = max(map(len, batch))
    padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in batch])  # causal: nothing reads it
    wanted = torch.tensor([tokens[1:] + [IGNORED] * (longest - len(tokens) + 1) for tokens in batch])
    logits = model(input_ids=padded, use_cache=False).logits.flatten(0, 1)
    each = cross_entropy(logits, wanted.flatten(), ignore_index=IGNORED, reduction="none").view(wanted.shape)
    return each.sum(1) / (wanted != IGNORED).sum(1)


@torch.no_grad()
def held_out_losses(model: Any, held: Sequence[list[int]], size: int) -> list[float]:
    """Return the loss of every held-out sequence."""
    model.eval()
    return [loss for at in range(0, len(held), size) for loss in losses(model, held[at : at + size]).tolist()]


def stepper(
    method: Method, model: Any, rate: float, seed: int
) -> tuple[Any, torch.optim.Optimizer, Callable[..., None]]:
    """Return the model to tune, its optimizer, and the function that makes a step with a batch."""
    if method is Method.SUBZERO:
        random_steps = SubZero(model.parameters(), rate, seed=seed)
        return model, random_steps, lambda batch: random_steps.step(lambda: float(losses(model, batch).mean()))
    if method in (Method.LORA, Method.LORA_RECOMPUTED):
        model = peft.get_peft_model(model, _LORA)
    if method is Method.LORA_RECOMPUTED:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate)

    def step(batch: Sequence[list[int]]) -> None:
        model.train()  # what recomputes activations; the model has no dropout
        losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def tune(method: Method, base: Path, sequences: Sequence[list[int]], config: TuningConfig) -> TuningRow:
    """Tune in this process, which must have done nothing else."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    rate = dict(config.rates)[method]
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model, optimizer, step = stepper(method, base_model, rate, config.seed)
    held, taught = sequences[: config.held], sequences[config.held :]
    start = held_out_losses(model, held, config.batch)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM becomes VmRSS
    resident, steps, seconds = _memory("VmRSS"), 0, 0.0
    for batch in endless_batches(taught, config.batch, config.seed):
        begun = time.process_time()
        step(batch)
        steps, seconds = steps + 1, seconds + time.process_time() - begun
        if seconds >= 60 * config.minutes:
            break
    peak = _memory("VmHWM")
    end = held_out_losses(model, held, config.batch)
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return TuningRow(
        method=method,
        learning_rate=rate,
        trainable=sum(each.numel() for each in model.parameters() if each.requires_grad),
        optimizer_bytes=sum(value.nbytes for value in kept),
        resident_bytes=resident,
        peak_bytes=peak,
        steps=steps,
        seconds=seconds,
        start=math.fsum(start) / len(start),
        end=math.fsum(end) / len(end),
        change=bootstrap([after - before for before, after in zip(start, end, strict=True)], seed=config.seed),
    )


def _memory(field: str) -> int:
    """Return a field of this process's memory in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def run(
    methods: Iterable[Method], base: Path, sequences: Sequence[list[int]], config: TuningConfig
) -> Iterator[TuningRow]:
    """Yield the row of every method, one after the other."""
    shuffled = random.Random(config.seed).sample(sequences, len(sequences))  # noqa: S311 - an order is no secret
    for method in methods:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool.submit(tune, method, base, shuffled, config).result()


def header(config: TuningConfig, base: Path, sequences: Sequence[list[int]]) -> dict[str, Any]:
    """Return the header of the result file."""
    mean = sum(map(len, sequences)) / len(sequences)
    return {"benchmark": NAME, "base": base.name, "histories": len(sequences), "mean_tokens": mean} | asdict(config)
