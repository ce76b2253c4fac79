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
from statistics import fmean
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
    """A sequence and, at each of its tokens, the node of the catalogue before it, or IGNORED where the token is no label."""

    tokens: Tokens
    nodes: Tokens


class Catalogue:
    """The beginnings of the items' codes, and the codes that may follow each.

    Attributes:
        codes: the code tokens of every item.
        allowed: bool [nodes, new tokens], whether a code follows a beginning.
        levels: int64 [nodes], the codes of a beginning.
    """

    def __init__(self, codes: dict[str, Tokens], first: int, new_tokens: int) -> None:
        self.codes = codes
        self._first = first
        paths = {tuple(path[:level]) for path in codes.values() for level in range(len(path))}
        self._nodes = {path: node for node, path in enumerate(sorted(paths, key=lambda path: (len(path), path)))}
        self.levels = torch.tensor([len(path) for path in self._nodes])
        self.allowed = torch.zeros(len(self._nodes), new_tokens, dtype=torch.bool)
        for path in codes.values():
            for level, code in enumerate(path):
                self.allowed[self._nodes[tuple(path[:level])], code - first] = True

    def popularity(self, histories: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return the logit of every code, [new tokens], that explains best how often the items of histories occur."""
        count = torch.zeros(self.allowed.shape)
        for path in (self.codes[item] for history in histories for item in history):
            for level, code in enumerate(path):
                count[self._nodes[tuple(path[:level])], code - self._first] += 1
        bias = torch.zeros(self.allowed.shape[1], requires_grad=True)
        optimiser = torch.optim.Adam([bias], lr=0.1)
        for _ in range(100):
            likely = bias.expand_as(count).masked_fill(~self.allowed, -math.inf).log_softmax(1)
            loss = -(count * likely.masked_fill(~self.allowed, 0)).sum() / count.sum() + 1e-3 * bias.square().mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return bias.detach()

    def windows(self, prefix: Tokens, history: Sequence[str]) -> Iterator[Example]:
        """Yield the windows of a history behind the prompt's text. Every item but the first is wanted once."""
        for start in range(0, max(1, len(history) - WINDOW + STEP), STEP):
            window = [self.codes[item] for item in history[start : start + WINDOW]]
            given = 1 if start == 0 else WINDOW - STEP
            context = prefix + [code for path in window[:given] for code in path]
            wanted = [code for path in window[given:] for code in path]
            nodes = [self._nodes[tuple(path[:level])] for path in window[given:] for level in range(len(path))]
            yield Example(context + wanted, [IGNORED] * len(context) + nodes)


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

    def __init__(self, base: Any, catalogue: Catalogue, rank: int) -> None:
        self._catalogue = catalogue
        self.first = base.config.vocab_size - catalogue.allowed.shape[1]
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
        self.rows: torch.nn.Parameter = self._layers.embed_tokens.token_adapter.trainable_tokens_delta["default"]
        self.layers = [weight for weight in self.model.parameters() if weight.requires_grad and weight is not self.rows]

    def losses(self, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of every label of a batch, in nats, and the level of its code. Logits are those of the new tokens."""
        states, nodes, wanted = self._states(batch)
        logits = (states @ self.rows.T).masked_fill(~self._catalogue.allowed[nodes], -math.inf)
        return cross_entropy(logits, wanted, reduction="none"), self._catalogue.levels[nodes]

    def _states(self, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the hidden states before the labels, [n, hidden], with the labels' nodes and their places among the codes.

        No gradient of the frozen rows is computed, which peft would do.
        """
        longest = max(len(example.tokens) for example in batch)
        tokens = torch.tensor([example.tokens + [0] * (longest - len(example.tokens)) for example in batch])
        nodes = torch.tensor([example.nodes + [IGNORED] * (longest - len(example.nodes)) for example in batch])[:, 1:]
        new = (tokens >= self.first)[..., None]
        embedded = torch.where(
            new,
            embedding((tokens - self.first).clamp(min=0), self.rows),
            embedding(tokens.clamp(max=self.first - 1), self.frozen),
        )
        # Padding stands on the right. Attention is causal, so it changes nothing before it.
        hidden = self._layers(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
        wanted = nodes != IGNORED
        return hidden[wanted], nodes[wanted], tokens[:, 1:][wanted] - self.first

    @torch.no_grad()
    def start_at_popularity(self, batch: Sequence[Example], bias: torch.Tensor) -> None:
        """Change the rows along the mean state of a batch, so that their logits there are `bias` [new tokens].

        States share most of their length, so the first lists are those of popularity, and training starts from there.
        """
        mean = self._states(batch)[0].mean(0)
        found = self.rows @ mean
        self.rows += (bias - bias.mean() - found + found.mean())[:, None] * mean / mean.dot(mean)

    @torch.no_grad()
    def mean_losses(self, made: Sequence[Sequence[Example]]) -> list[float]:
        """Return the mean loss of every level."""
        losses, levels = map(torch.cat, zip(*map(self.losses, made), strict=True))
        return [float(losses[levels == level].mean()) for level in range(int(levels.max()) + 1)]


def thinned(history: Sequence[str], dropout: float, generator: random.Random) -> Sequence[str]:
    """Return a history without a random share of its items. At least two stay."""
    kept = [item for item in history if generator.random() >= dropout]
    return kept if len(kept) > 1 else history


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
        epochs: epochs that are done.
        best: the smallest held-out loss of an item so far.
        seconds: processor time that training took.
        log: one entry per epoch.
    """

    step: int = 0
    epochs: int = 0
    best: float = math.inf
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """A training run that can stop after any step and go on later. Its batches depend on the seed alone."""

    learner: Learner
    catalogue: Catalogue
    prefix: Tokens
    train: Sequence[Sequence[str]]
    held: Sequence[Sequence[str]]
    options: argparse.Namespace
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        options = self.options
        groups = [
            {"params": self.learner.layers, "rate": options.learning_rate},
            {"params": [self.learner.rows], "rate": options.row_learning_rate},
        ]
        self._optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
        self._state = options.out / "training.pt"
        self._recent: list[float] = []
        self._held = self._batches(self.held, random.Random(0))
        self.learner.start_at_popularity(self._held[0], self.catalogue.popularity(self.train))
        if self._state.exists():
            saved = torch.load(self._state, weights_only=True)
            self.progress = Progress(**saved["progress"])
            set_peft_model_state_dict(self.learner.model, saved["weights"])
            self._optimiser.load_state_dict(saved["optimiser"])

    def complete(self) -> bool:
        """Train to the end, or until the time is up. Return whether the run is complete."""
        begun, done = time.monotonic(), 0
        steps = sum(len(self._epoch(epoch)) for epoch in range(self.options.epochs))
        for epoch in range(self.options.epochs):
            made = self._epoch(epoch)
            for batch in made[max(0, self.progress.step - done) :]:
                self._step(batch, steps)
                if self.progress.step % self.options.save_steps == 0:
                    self._save()
                if time.monotonic() - begun > 60 * self.options.minutes:
                    self._save()
                    return False
            done += len(made)
            if self.progress.epochs == epoch:
                self._end_epoch()
        return True

    def _epoch(self, epoch: int) -> list[list[Example]]:
        """Return the batches of an epoch. Each epoch leaves out other items."""
        generator = random.Random(self.options.seed + epoch)
        return self._batches(
            [thinned(history, self.options.item_dropout, generator) for history in self.train], generator
        )

    def _batches(self, histories: Sequence[Sequence[str]], generator: random.Random) -> list[list[Example]]:
        examples = [example for history in histories for example in self.catalogue.windows(self.prefix, history)]
        return batches(examples, self.options.batch_tokens, generator)

    def _step(self, batch: Sequence[Example], steps: int) -> None:
        """Learn from one batch, with a short warm-up and a cosine down to zero."""
        started = time.process_time()
        share = self.progress.step / steps
        for group in self._optimiser.param_groups:
            group["lr"] = group["rate"] * min(1.0, share / 0.03 + 0.05) * 0.5 * (1 + math.cos(math.pi * share))
        loss = self.learner.losses(batch)[0].mean()
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*self.learner.layers, self.learner.rows], 1.0)
        self._optimiser.step()
        self.progress.step += 1
        self.progress.seconds += time.process_time() - started
        self._recent.append(loss.item())
        if self.progress.step % 20 == 0:
            print(f"step {self.progress.step} of {steps}: loss {fmean(self._recent):.3f}", flush=True)
            self._recent.clear()

    def _end_epoch(self) -> None:
        """Keep the adapter if it is the best one so far."""
        self.progress.epochs += 1
        losses = self.learner.mean_losses(self._held)
        line = {
            "epoch": self.progress.epochs,
            "held_out_loss_per_level": losses,
            "processor_seconds": round(self.progress.seconds),
        }
        self.progress.log.append(line)
        print(json.dumps(line), flush=True)
        if sum(losses) < self.progress.best:
            self.progress.best = sum(losses)
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
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--row-learning-rate", type=float, default=3e-4)
    parser.add_argument(
        "--item-dropout", type=float, default=0.2, help="share of a history's items that an epoch leaves out"
    )
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
    histories = [json.loads(line)["items"] for line in lines]
    random.Random(options.seed).shuffle(histories)
    count = min(options.held, len(histories) // 10)
    catalogue = Catalogue(codes, base.config.vocab_size - new_tokens, new_tokens)
    learner = Learner(base, catalogue, options.rank)
    run = Run(learner, catalogue, prefix, train=histories[count:], held=histories[:count], options=options)
    if not run.complete():
        print(f"stopped after step {run.progress.step}; the same command goes on", flush=True)
        sys.exit(STOPPED)
    (options.out / "training.json").write_text(json.dumps(run.progress.log, indent=1), encoding="utf-8")
    print(options.out / "adapter")


if __name__ == "__main__":
    main()
