"""Teaches SmolLM2-135M the codes of Amazon Office: one new token per code, and an output row of each.

    python examples/smollm2/fine_tune.py BASE OUT

BASE is the folder of `atspeed base smollm2`, OUT that of examples/office/prepare.py. The script uses transformers only, as the
authors of a checkpoint do, and nothing of atspeed. It writes

    OUT/states/N.pt             hidden states before every code of the histories, computed once; what a stopped run needs to go on
    OUT/checkpoint/             the model with its grown vocabulary and tokenizer
    OUT/training.json           the loss on held-out histories after each epoch

The layers stay as they were pretrained, and so do the new rows of the input, which are made of titles. So each history passes
through the model a few times only, and the output rows learn from its states in seconds.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PROMPT = (Path(__file__).parent / "prompt.txt").read_text(encoding="utf-8")
IGNORED = -100  # tokens with this node are no labels
WINDOW, STEP = 11, 5  # items of a training sequence, and between the starts of two
STOPPED = 75

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


def thinned(history: Sequence[str], dropout: float, generator: random.Random) -> Sequence[str]:
    """Return a history without a random share of its items. At least two stay."""
    kept = [item for item in history if generator.random() >= dropout]
    return kept if len(kept) > 1 else history


def grown_base(base: Path, out: Path) -> tuple[Any, Any, int]:
    """Return the base with one token per code and rows of its own in the output, its tokenizer and the number of new tokens.

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
    # A step that is right for a row of the output is far too small for the same row as input: states are 50 long, rows 3.
    model.lm_head.weight = torch.nn.Parameter(table.detach().clone())
    model.config.tie_word_embeddings = False
    return model, tokenizer, len(words)


@dataclass(frozen=True)
class States:
    """Hidden states before codes.

    Attributes:
        hidden: float32 [n, hidden size].
        nodes: int64 [n], the nodes of the catalogue before the codes.
        codes: int64 [n], the codes, counted from the first new token.
    """

    hidden: torch.Tensor
    nodes: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        """Return all states of parts."""
        return cls(*(torch.cat([vars(part)[name] for part in parts]) for name in ("hidden", "nodes", "codes")))


@torch.no_grad()
def states(model: Any, first: int, batch: Sequence[Example]) -> States:
    """Return the states before the labels of a batch."""
    longest = max(len(example.tokens) for example in batch)
    # Padding stands on the right. Attention is causal, so it changes nothing before it.
    tokens = torch.tensor([example.tokens + [0] * (longest - len(example.tokens)) for example in batch])
    nodes = torch.tensor([example.nodes + [IGNORED] * (longest - len(example.nodes)) for example in batch])[:, 1:]
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    wanted = nodes != IGNORED
    return States(hidden[wanted], nodes[wanted], tokens[:, 1:][wanted] - first)


class Passes:
    """States of the histories, one file per pass. The first pass has all items, and each other one leaves out some."""

    def __init__(self, model: Any, catalogue: Catalogue, prefix: Tokens, options: argparse.Namespace) -> None:
        self._model = model
        self._catalogue = catalogue
        self._prefix = prefix
        self._options = options
        self._first = model.config.vocab_size - catalogue.allowed.shape[1]
        self._folder: Path = options.out / "states"

    def read(self, name: str, histories: Sequence[Sequence[str]], dropout: float, seed: int) -> States:
        """Return the states of a pass. They are computed if no file has them."""
        path = self._folder / f"{name}.pt"
        if not path.exists():
            generator = random.Random(seed)
            kept = [thinned(history, dropout, generator) for history in histories]
            examples = [example for history in kept for example in self._catalogue.windows(self._prefix, history)]
            made = batches(examples, self._options.batch_tokens, generator)
            found = States.joined([states(self._model, self._first, batch) for batch in made])
            path.parent.mkdir(exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save(vars(found), partial)
            partial.rename(path)
            print(f"pass {name}: states before {len(found.codes):,} codes", flush=True)
        return States(**torch.load(path, weights_only=True))

    def all(self, histories: Sequence[Sequence[str]]) -> States:
        """Return the states of all passes. The process exits if the time is up before the last one."""
        begun, made = time.monotonic(), []
        for number in range(self._options.passes):
            if made and time.monotonic() - begun > 60 * self._options.minutes:
                print(f"stopped after pass {number - 1}; the same command goes on", flush=True)
                sys.exit(STOPPED)
            dropout = self._options.item_dropout if number else 0.0
            made.append(self.read(str(number), histories, dropout, self._options.seed + number))
        return States.joined(made)


class Head:
    """Output rows of the new tokens: a softmax over the codes that the catalogue allows, learned from states.

    The states lie near one line: their length is 50, and their distance to the mean is 11. So rows are learned as coefficients of
    directions in which the states are equally long. `flattening` is the share of the mean variance that is added to each.
    """

    def __init__(self, found: States, catalogue: Catalogue, bias: torch.Tensor, flattening: float) -> None:
        self._catalogue = catalogue
        lengths, directions = torch.linalg.eigh(found.hidden.T @ found.hidden / len(found.hidden))
        # The last direction is that of the mean. It is many times as long as the others.
        self._basis = directions * (lengths + flattening * lengths[:-1].mean()).rsqrt()
        mean = found.hidden.mean(0) @ self._basis
        self._start = bias[:, None] * mean / mean.dot(mean)  # lists begin as those of popularity
        self.coefficients = self._start.clone().requires_grad_(True)

    def rows(self) -> torch.Tensor:
        """Return the rows, [new tokens, hidden size]."""
        return self.coefficients.detach() @ self._basis.T

    def losses(self, found: States) -> torch.Tensor:
        """Return the loss of every code in nats, [n]."""
        logits = found.hidden @ self._basis @ self.coefficients.T
        return cross_entropy(
            logits.masked_fill(~self._catalogue.allowed[found.nodes], -math.inf), found.codes, reduction="none"
        )

    def distance(self) -> torch.Tensor:
        """Return the squared distance of the coefficients to where they started."""
        return (self.coefficients - self._start).square().sum()

    @torch.no_grad()
    def mean_losses(self, found: States) -> list[float]:
        """Return the mean loss of every level."""
        losses, levels = self.losses(found), self._catalogue.levels[found.nodes]
        return [float(losses[levels == level].mean()) for level in range(int(levels.max()) + 1)]


def learned_rows(
    head: Head, found: States, held: States, options: argparse.Namespace
) -> tuple[torch.Tensor, list[Any]]:
    """Return the rows of the epoch with the smallest held-out loss, and the losses of all epochs. Epoch 0 is popularity."""
    optimiser = torch.optim.Adam([head.coefficients], lr=options.learning_rate)
    steps = options.epochs * math.ceil(len(found.codes) / options.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    best, kept, log = math.inf, head.rows(), []
    for epoch in range(options.epochs + 1):
        if epoch:
            for chosen in torch.randperm(len(found.codes)).split(options.batch_size):
                batch = States(found.hidden[chosen], found.nodes[chosen], found.codes[chosen])
                loss = head.losses(batch).mean() + options.penalty * head.distance()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
        losses = head.mean_losses(held)
        log.append({"epoch": epoch, "held_out_loss_per_level": losses})
        print(json.dumps(log[-1]), flush=True)
        if sum(losses) < best:
            best, kept = sum(losses), head.rows()
    return kept, log


def arguments() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=960, help="of a pass")
    parser.add_argument(
        "--item-dropout", type=float, default=0.2, help="share of a history's items that a pass leaves out"
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=512, help="codes of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--penalty", type=float, default=1e-3, help="of the squared distance to popularity")
    parser.add_argument("--flattening", type=float, default=1e-2)
    parser.add_argument("--held", type=int, default=100, help="histories that choose the epoch; a tenth at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    options = arguments()
    torch.manual_seed(options.seed)
    model, tokenizer, new_tokens = grown_base(options.base, options.out)
    index = json.loads((options.out / "Office.index.json").read_text(encoding="utf-8"))
    codes = {item: tokenizer.convert_tokens_to_ids(names) for item, names in index.items()}
    prefix = tokenizer(PROMPT.format(history=""))["input_ids"]
    lines = (options.out / "histories.jsonl").read_text(encoding="utf-8").splitlines()
    histories = [json.loads(line)["items"] for line in lines]
    random.Random(options.seed).shuffle(histories)
    count = min(options.held, len(histories) // 10)
    first = model.config.vocab_size - new_tokens
    catalogue = Catalogue(codes, first, new_tokens)
    passes = Passes(model, catalogue, prefix, options)
    held = passes.read("held", histories[:count], 0.0, options.seed)
    found = passes.all(histories[count:])
    head = Head(found, catalogue, catalogue.popularity(histories[count:]), options.flattening)
    rows, log = learned_rows(head, found, held, options)
    with torch.no_grad():
        model.lm_head.weight[first:] = rows
    model.save_pretrained(options.out / "checkpoint")
    tokenizer.save_pretrained(options.out / "checkpoint")
    (options.out / "training.json").write_text(json.dumps(log, indent=1), encoding="utf-8")
    print(options.out / "checkpoint")


if __name__ == "__main__":
    main()
