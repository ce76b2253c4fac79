"""Trains a small Qwen2 in MiniOneRec's format: a checkpoint to import.

    python examples/office/train_checkpoint.py OUT

OUT is the folder of prepare.py. The script uses transformers and tokenizers only, as the authors of a checkpoint do, and nothing
of atspeed. It writes OUT/checkpoint: the model in bfloat16, with its tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

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
MAX_ITEMS = 10
HELD = 20  # one history of so many chooses the epoch, and teaches nothing
IGNORED = -100  # transformers leaves labels of this value out of the loss

Tokens = list[int]


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

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._instruction: Tokens = tokenizer(INSTRUCTION)["input_ids"]
        codes = len(tokenizer.get_added_vocab()) - 1  # all added tokens but the end of the text
        self._first_code = len(tokenizer) - codes

    def example(self, history: Sequence[str], target: str) -> tuple[Tokens, Tokens]:
        """Return the tokens of one sequence, its prompt rendered as MiniOneRec renders it, and its labels."""
        text = ", ".join(self._texts[item] for item in history[-MAX_ITEMS:])
        prompt: Tokens = self._instruction + self._tokenizer(INPUT.format(history=text))["input_ids"]
        answer: Tokens = self._tokenizer(self._texts[target] + "\n")["input_ids"] + [self._tokenizer.eos_token_id]
        # Items of the history are labels too: few histories then teach as much as many.
        labels = [token if token >= self._first_code else IGNORED for token in prompt]
        return prompt + answer, labels + answer

    def epoch(self, histories: Sequence[Sequence[str]], generator: random.Random) -> list[tuple[Tokens, Tokens]]:
        """Return one sequence per history, which ends at a random place: every epoch has other prompts."""
        cuts = [generator.randrange(1, len(history)) for history in histories]
        return [self.example(history[:cut], history[cut]) for history, cut in zip(histories, cuts, strict=True)]


def batches(examples: Sequence[tuple[Tokens, Tokens]], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches, padded on the right: attention is causal, so padding changes nothing before it."""
    for start in range(0, len(examples), size):
        chosen = examples[start : start + size]
        longest = max(len(tokens) for tokens, _ in chosen)
        tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
        labels = torch.full((len(chosen), longest), IGNORED)
        for row, (ids, wanted) in enumerate(chosen):
            tokens[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(wanted)] = torch.tensor(wanted)
        yield tokens, labels


def train(
    model: Qwen2ForCausalLM, made: Examples, histories: Sequence[Sequence[str]], options: argparse.Namespace
) -> None:
    """Train with AdamW and a cosine down to zero. The weights of the epoch with the smallest held-out loss are kept."""
    generator = random.Random(options.seed)
    shuffled = generator.sample(histories, len(histories))
    held, learned = shuffled[: len(histories) // HELD], shuffled[len(histories) // HELD :]
    held_batches = list(batches(made.epoch(held, generator), options.batch_size))
    steps = options.epochs * math.ceil(len(learned) / options.batch_size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.learning_rate, total_steps=steps, pct_start=0.1)
    best, kept = math.inf, model.state_dict()
    for epoch in range(options.epochs):
        model.train()
        examples = made.epoch(learned, generator)
        generator.shuffle(examples)
        losses = []
        for tokens, labels in batches(examples, options.batch_size):
            loss = model(input_ids=tokens, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        found = mean_loss(model, held_batches)
        print(f"epoch {epoch + 1} of {options.epochs}: loss {fmean(losses):.4f}, held out {found:.4f}", flush=True)
        if found < best:
            best, kept = found, {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(kept)


@torch.no_grad()
def mean_loss(model: Qwen2ForCausalLM, made: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the mean loss of batches, without dropout."""
    model.eval()
    return fmean(float(model(input_ids=tokens, labels=labels).loss) for tokens, labels in made)


def arguments() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2, help="share of a layer's output that training drops")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def small_model(tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> Qwen2ForCausalLM:
    """Return a Qwen2 with random weights, whose layers drop a share of their outputs in training."""
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
    for layer in model.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.register_forward_hook(
                lambda module, _inputs, output: torch.nn.functional.dropout(output, options.dropout, module.training)
            )
    return model


def main() -> None:
    """Run the command."""
    options = arguments()
    torch.manual_seed(options.seed)
    index: dict[str, list[str]] = json.loads((options.out / "Office.index.json").read_text(encoding="utf-8"))
    titles: dict[str, str] = json.loads((options.out / "titles.json").read_text(encoding="utf-8"))
    lines = (options.out / "histories.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer(
        [*titles.values(), *[INSTRUCTION, INPUT] * 100], [code for codes in index.values() for code in codes]
    )
    model = small_model(tokenizer, options)
    texts = {item: "".join(codes) for item, codes in index.items()}
    train(model, Examples(tokenizer, texts), [json.loads(line)["items"] for line in lines], options)
    checkpoint = options.out / "checkpoint"
    model.to(torch.bfloat16).save_pretrained(checkpoint, max_shard_size="2MB")
    tokenizer.save_pretrained(checkpoint)
    print(checkpoint)


if __name__ == "__main__":
    main()
