"""Trains a small Qwen2 in MiniOneRec's format: a checkpoint to import.

    python examples/office/train_checkpoint.py DATA OUT

DATA holds items.jsonl ({id, title, codes}), valid.jsonl and test.jsonl ({history, target}). The script uses transformers and
tokenizers only, as the authors of a checkpoint do, and nothing of atspeed. It writes

    OUT/checkpoint/             the model in bfloat16, with its tokenizer
    OUT/Office.index.json       item -> its code tokens
    OUT/histories.jsonl         histories that the model learned from: {user, items}, oldest first
    OUT/questions.jsonl         histories with their next item, which it has not seen: {user, items, target}

The training file of MiniOneRec is not published with its other files. So the model learns from the histories of valid.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

# MiniOneRec's two strings. They are tokenised apart, and their tokens are concatenated.
INSTRUCTION = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. \n\n### Instruction:\n"
    "Can you predict the next possible item that the user may expect?\n\n"
)
INPUT = (
    "### User Input: \nCan you predict the next possible item the user may expect, given the following chronological "
    "interaction history: {history}\n\n### Response:\n"
)
END = "<|endoftext|>"
VOCABULARY = 2_000  # of the text alone
IGNORED = -100  # transformers leaves labels of this value out of the loss

Tokens = list[int]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def semantic_id(codes: Sequence[int]) -> str:
    """Return an item's semantic ID as text: <a_60><b_159><c_203>."""
    return "".join(f"<{letter}_{code}>" for letter, code in zip("abcdefgh", codes, strict=False))


def train_tokenizer(texts: Sequence[str], codes: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts, and add the code tokens as MiniOneRec adds them: sorted, not special."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    bpe.train_from_iterator(texts, BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    tokenizer.add_tokens(sorted(set(codes)))
    return tokenizer


class Examples:
    """Training sequences: prompt, next item, line feed, end of text. The loss counts item tokens and what follows them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, items: dict[int, str], max_items: int) -> None:
        self._tokenizer = tokenizer
        self._items = items
        self._max_items = max_items
        self._instruction: Tokens = tokenizer(INSTRUCTION)["input_ids"]

    def prompt(self, history: Sequence[int]) -> Tokens:
        """Return the tokens of a prompt, rendered as MiniOneRec renders them."""
        text = ", ".join(self._items[item] for item in history[-self._max_items :])
        prompt: Tokens = self._instruction + self._tokenizer(INPUT.format(history=text))["input_ids"]
        return prompt

    def example(self, history: Sequence[int], target: int) -> tuple[Tokens, Tokens]:
        """Return the tokens of one sequence and its labels."""
        prompt = self.prompt(history)
        answer: Tokens = self._tokenizer(self._items[target] + "\n")["input_ids"] + [self._tokenizer.eos_token_id]
        first_code = len(self._tokenizer) - self._codes
        # Items of the history are labels too: few histories then teach as much as many.
        labels = [token if token >= first_code else IGNORED for token in prompt]
        return prompt + answer, labels + answer

    @property
    def _codes(self) -> int:
        return len(self._tokenizer.get_added_vocab()) - 1  # all added tokens but the end of the text


def batches(
    examples: Sequence[tuple[Tokens, Tokens]], size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one epoch in random order, padded on the right: attention is causal, so padding changes nothing before it."""
    order = torch.randperm(len(examples), generator=generator).tolist()
    for start in range(0, len(order), size):
        chosen = [examples[index] for index in order[start : start + size]]
        longest = max(len(tokens) for tokens, _ in chosen)
        tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
        labels = torch.full((len(chosen), longest), IGNORED)
        for row, (ids, wanted) in enumerate(chosen):
            tokens[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(wanted)] = torch.tensor(wanted)
        yield tokens, labels


def train(model: Qwen2ForCausalLM, examples: Sequence[tuple[Tokens, Tokens]], options: argparse.Namespace) -> None:
    """Train with AdamW, a warm-up of a tenth of the steps, and a cosine down to zero."""
    steps = options.epochs * math.ceil(len(examples) / options.batch_size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(options.seed)
    model.train()
    for epoch in range(options.epochs):
        total, count = 0.0, 0
        for tokens, labels in batches(examples, options.batch_size, generator):
            loss = model(input_ids=tokens, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total, count = total + loss.item(), count + 1
        print(f"epoch {epoch + 1} of {options.epochs}: loss {total / count:.4f}", flush=True)
    model.eval()


def arguments() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--max-items", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    options = arguments()
    torch.manual_seed(options.seed)
    catalogue = read(options.data / "items.jsonl")
    items = {item["id"]: semantic_id(item["codes"]) for item in catalogue}
    codes = [f"{token}>" for text in items.values() for token in text.split(">")[:-1]]
    texts = [item["title"] for item in catalogue] + [INSTRUCTION, INPUT] * 100
    tokenizer = train_tokenizer(texts, codes)
    made = Examples(tokenizer, items, options.max_items)
    rows = read(options.data / "valid.jsonl")
    examples = [made.example(row["history"], row["target"]) for row in rows]

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    train(model, examples, options)

    checkpoint = options.out / "checkpoint"
    model.to(torch.bfloat16).save_pretrained(checkpoint, max_shard_size="2MB")
    tokenizer.save_pretrained(checkpoint)
    index = {str(item): [f"{token}>" for token in text.split(">")[:-1]] for item, text in items.items()}
    (options.out / "Office.index.json").write_text(json.dumps(index), encoding="utf-8")
    write_histories(options.out / "histories.jsonl", rows, with_target=False)
    write_histories(options.out / "questions.jsonl", read(options.data / "test.jsonl"), with_target=True)
    print(checkpoint)


def write_histories(path: Path, rows: Sequence[dict[str, Any]], *, with_target: bool) -> None:
    """Write histories, one JSON object a line. Without the target as a field it is the last item."""
    with path.open("w", encoding="utf-8") as file:
        for user, row in enumerate(rows):
            history, target = [str(item) for item in row["history"]], str(row["target"])
            found = {"items": history, "target": target} if with_target else {"items": [*history, target]}
            file.write(json.dumps({"user": f"u{user}", **found}) + "\n")


if __name__ == "__main__":
    main()
