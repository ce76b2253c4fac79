"""Fine-tunes SmolLM2-135M on Amazon Office: LoRA on all layers, and one new token per code.

    python examples/smollm2/fine_tune.py BASE OUT

BASE is the folder of `atspeed base smollm2`, OUT that of examples/office/prepare.py. The script uses transformers and peft only,
as the authors of a checkpoint do, and nothing of atspeed. It writes

    OUT/base/                   the base with its grown vocabulary and tokenizer
    OUT/adapter/                the adapter of the epoch with the smallest loss on histories that were held out
    OUT/training.pt             what a stopped run needs to go on

--minutes M stops after M minutes, with exit code 75. The same command goes on from there; code 0 says that training is complete.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import cross_entropy, embedding
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PROMPT = (Path(__file__).parent / "prompt.txt").read_text(encoding="utf-8")
IGNORED = -100  # labels of this value are not in the loss
WINDOW, STEP = 11, 5  # items of a training sequence, and between the starts of two
STOPPED = 75
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Tokens = list[int]


@dataclass(frozen=True)
class Example:
    """A sequence and its labels, which are the sequence's own tokens or IGNORED."""

    tokens: Tokens
    labels: Tokens


def windows(prefix: Tokens, codes: Sequence[Tokens]) -> Iterator[Example]:
    """Yield the windows of a history as sequences behind the prompt's text. Every item but the first is a label once."""
    for start in range(0, max(1, len(codes) - WINDOW + STEP), STEP):
        window = codes[start : start + WINDOW]
        given = 1 if start == 0 else WINDOW - STEP
        context = prefix + [token for item in window[:given] for token in item]
        wanted = [token for item in window[given:] for token in item]
        yield Example(context + wanted, [IGNORED] * len(context) + wanted)


def batches(examples: Sequence[Example], tokens: int, generator: random.Random) -> list[list[Example]]:
    """Return batches of about as many tokens each, in random order. Sequences of a batch have nearly the same length."""
    made: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda example: (len(example.tokens), generator.random())):
        if made[-1] and (len(made[-1]) + 1) * len(example.tokens) > tokens:
            made.append([])
        made[-1].append(example)
    generator.shuffle(made)
    return made


class Learner:
    """A base with LoRA on all projections and trainable rows for the new tokens. Nothing else learns.

    The new tokens are the last ones of the vocabulary. Their rows are those that peft saves with an adapter.
    """

    def __init__(self, base: Any, new_tokens: int, rank: int) -> None:
        self.first = base.config.vocab_size - new_tokens
        self.frozen = base.get_input_embeddings().weight.detach()[: self.first].clone()
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=2 * rank,
            target_modules=PROJECTIONS,
            trainable_token_indices=list(range(self.first, base.config.vocab_size)),
        )
        self.model: Any = get_peft_model(base, config)
        inner: Any = self.model.get_base_model()
        self._layers = inner.model
        self._rows: torch.nn.Parameter = self._layers.embed_tokens.token_adapter.trainable_tokens_delta["default"]
        self.parameters = [weight for weight in self.model.parameters() if weight.requires_grad]

    def loss(self, batch: Sequence[Example]) -> tuple[torch.Tensor, int]:
        """Return the summed loss of a batch and the number of its labels.

        Logits are computed where there are labels. No gradient of the frozen rows is computed, which peft would do.
        """
        longest = max(len(example.tokens) for example in batch)
        tokens = torch.tensor([example.tokens + [0] * (longest - len(example.tokens)) for example in batch])
        labels = torch.tensor([example.labels + [IGNORED] * (longest - len(example.labels)) for example in batch])
        new = (tokens >= self.first)[..., None]
        embedded = torch.where(
            new,
            embedding((tokens - self.first).clamp(min=0), self._rows),
            embedding(tokens.clamp(max=self.first - 1), self.frozen),
        )
        # Padding stands on the right. Attention is causal, so it changes nothing before it.
        hidden = self._layers(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != IGNORED
        states = hidden[wanted]
        logits = torch.cat([states @ self.frozen.T, states @ self._rows.T], dim=1)
        return cross_entropy(logits, labels[:, 1:][wanted], reduction="sum"), int(wanted.sum())

    @torch.no_grad()
    def mean_loss(self, made: Sequence[Sequence[Example]]) -> float:
        """Return the mean loss per code."""
        found = [self.loss(batch) for batch in made]
        return sum(float(loss) for loss, _ in found) / sum(count for _, count in found)


def grown_base(base: Path, out: Path) -> tuple[Any, Any, int]:
    """Return the base with one token per code, its tokenizer and the number of new tokens. Writes both to OUT/base.

    Tokens are added as MiniOneRec's authors add them: sorted by name, not special. A new row is not random: it is the row of
    the level's letter, plus what the titles of the code's items have more of than all titles, as long as that of a word.
    """
    index: dict[str, list[str]] = json.loads((out / "Office.index.json").read_text(encoding="utf-8"))
    titles: dict[str, str] = json.loads((out / "titles.json").read_text(encoding="utf-8"))
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    words = defaultdict[str, Tokens](list)
    for item, codes in index.items():
        spelled = tokenizer(titles[item])["input_ids"]
        for code in codes:
            words[code] += spelled
    tokenizer.add_tokens(sorted(words))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        used = table[torch.tensor(sorted({token for spelled in words.values() for token in spelled}))]
        centre, distance = used.mean(0), (used - used.mean(0)).norm(dim=1).mean()
        for code, spelled in words.items():
            direction = table[torch.tensor(spelled)].mean(0) - centre
            letter = table[tokenizer(f" {code[1].upper()}")["input_ids"][-1]]
            table[tokenizer.convert_tokens_to_ids(code)] = letter + direction * (distance / direction.norm())
    if not (out / "base" / "tokenizer.json").exists():
        model.save_pretrained(out / "base")
        tokenizer.save_pretrained(out / "base")
    return model, tokenizer, len(words)


@dataclass
class Progress:
    """The state of a run between two steps.

    Attributes:
        step: steps that are done.
        best: the smallest held-out loss so far.
        seconds: processor time that training took.
    """

    step: int = 0
    best: float = math.inf
    seconds: float = 0.0


@dataclass
class Run:
    """A training run that can stop after any step and go on later. The order of its batches depends on the seed alone."""

    learner: Learner
    train: Sequence[Example]
    held: Sequence[Example]
    options: argparse.Namespace
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._optimiser = torch.optim.AdamW(self.learner.parameters, lr=self.options.learning_rate, weight_decay=0.01)
        self._state = self.options.out / "training.pt"
        self._held = batches(self.held, self.options.batch_tokens, random.Random(0))
        if self._state.exists():
            saved = torch.load(self._state, weights_only=True)
            self.progress = Progress(**saved["progress"])
            set_peft_model_state_dict(self.learner.model, saved["weights"])
            self._optimiser.load_state_dict(saved["optimiser"])

    def complete(self) -> bool:
        """Train to the end, or until the time is up. Return whether the run is complete."""
        begun, steps = time.monotonic(), self._steps()
        while self.progress.step < self.options.epochs * steps:
            epoch, place = divmod(self.progress.step, steps)
            order = batches(self.train, self.options.batch_tokens, random.Random(self.options.seed + epoch))
            for batch in order[place:steps]:
                self._step(batch, self.options.epochs * steps)
                if self.progress.step % self.options.save_steps == 0:
                    self._save()
                if time.monotonic() - begun > 60 * self.options.minutes:
                    self._save()
                    return False
            self._end_epoch(epoch)
        return True

    def _steps(self) -> int:
        """Return the steps of an epoch. Batches are cut by length, so that every order has the same number."""
        return len(batches(self.train, self.options.batch_tokens, random.Random(0)))

    def _step(self, batch: Sequence[Example], steps: int) -> None:
        """Learn from one batch, with a short warm-up and a cosine down to zero."""
        started = time.process_time()
        share = self.progress.step / steps
        rate = self.options.learning_rate * min(1.0, share / 0.03 + 0.05) * 0.5 * (1 + math.cos(math.pi * share))
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        loss, count = self.learner.loss(batch)
        self._optimiser.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters, 1.0)
        self._optimiser.step()
        self.progress.step += 1
        self.progress.seconds += time.process_time() - started
        if self.progress.step % 10 == 0:
            print(f"step {self.progress.step} of {steps}: loss {loss.item() / count:.3f}", flush=True)

    def _end_epoch(self, epoch: int) -> None:
        """Keep the adapter if it is the best one so far."""
        loss = self.learner.mean_loss(self._held)
        print(
            f"epoch {epoch + 1}: held-out loss {loss:.4f}, {self.progress.seconds:.0f} s of processor time", flush=True
        )
        if loss < self.progress.best:
            self.progress.best = loss
            self.learner.model.save_pretrained(self.options.out / "adapter", save_embedding_layers=False)
        self._save()

    def _save(self) -> None:
        """Write the state in one step, so that a kill leaves the last one."""
        partial = self._state.with_suffix(".partial")
        state = {
            "progress": vars(self.progress),
            "weights": get_peft_model_state_dict(self.learner.model, save_embedding_layers=False),
            "optimiser": self._optimiser.state_dict(),
        }
        torch.save(state, partial)
        partial.rename(self._state)


def arguments() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--held", type=int, default=100, help="histories that choose the epoch; a tenth at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--save-steps", type=int, default=50)
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    options = arguments()
    torch.manual_seed(options.seed)
    base, tokenizer, new_tokens = grown_base(options.base, options.out)
    index = json.loads((options.out / "Office.index.json").read_text(encoding="utf-8"))
    codes = {item: tokenizer.convert_tokens_to_ids(names) for item, names in index.items()}
    prefix = tokenizer(PROMPT.format(history=""))["input_ids"]
    lines = (options.out / "histories.jsonl").read_text(encoding="utf-8").splitlines()
    histories = [[codes[item] for item in json.loads(line)["items"]] for line in lines]
    random.Random(options.seed).shuffle(histories)
    count = min(options.held, len(histories) // 10)
    held, train = histories[:count], histories[count:]
    run = Run(
        Learner(base, new_tokens, options.rank),
        train=[example for history in train for example in windows(prefix, history)],
        held=[example for history in held for example in windows(prefix, history)],
        options=options,
    )
    if not run.complete():
        print(f"stopped after step {run.progress.step}; the same command goes on", flush=True)
        sys.exit(STOPPED)
    print(options.out / "adapter")


if __name__ == "__main__":
    main()
