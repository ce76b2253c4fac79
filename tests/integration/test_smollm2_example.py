"""The SmolLM2 example on a made-up base: training that stops and resumes, its checkpoint imported, lists compared."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.command_line import run
from tests.integration.office_data import EXAMPLES, ROWS, prepare, script

PROMPT = ("--prompt", EXAMPLES / "smollm2" / "prompt.txt", "--separator", "", "--max-items", 10)


def made_base(folder: Path) -> None:
    """Write a Llama with random weights and tied embeddings, as SmolLM2 has them, and a BPE tokenizer of bytes."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=280, special_tokens=["<|im_end|>"], initial_alphabet=ByteLevel.alphabet())
    bpe.train_from_iterator(["Item number", "Bought in this order"], trainer)
    wrapped: Any = PreTrainedTokenizerFast
    tokenizer = wrapped(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fine_tune(base: Path, out: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return script("smollm2/fine_tune.py", base, out, "--passes", 2, "--held", 10, *options)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was trained in one run."""
    folder = tmp_path_factory.mktemp("smollm2")
    prepare(folder / "data", folder)
    made_base(folder / "base-model")
    done = fine_tune(folder / "base-model", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_stopped_run_ends_with_the_weights_of_one_that_ran_through(out: Path, tmp_path: Path) -> None:
    for name in ("Office.index.json", "titles.json", "histories.jsonl"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    stopped = fine_tune(out / "base-model", tmp_path, "--minutes", 0)
    assert stopped.returncode == 75
    assert "stopped after pass 0;" in stopped.stdout
    done = fine_tune(out / "base-model", tmp_path)
    assert done.returncode == 0
    assert "pass 0:" not in done.stdout
    one, other = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (out, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_only_the_output_rows_of_the_codes_learn(out: Path) -> None:
    """The kept epoch has a smaller loss than popularity, on held-out histories."""
    base, made = (load_file(out / folder / "model.safetensors") for folder in ("base-model", "checkpoint"))
    head, table = made.pop("lm_head.weight"), made.pop("model.embed_tokens.weight")
    text = base.pop("model.embed_tokens.weight")
    assert base.keys() == made.keys()
    assert all(torch.equal(weight, made[name]) for name, weight in base.items())
    assert torch.equal(table[: len(text)], text)
    assert torch.equal(head[: len(text)], text)
    assert not torch.isclose(head[len(text) :], table[len(text) :]).all(dim=1).any()
    losses = [sum(row["held_out_loss_per_level"]) for row in json.loads((out / "training.json").read_text())]
    assert min(losses) < losses[0]


def test_the_checkpoint_is_imported_and_its_lists_are_those_of_generate(out: Path) -> None:
    """`generate` reads the text of the user's own prompt."""
    files = ("--index", out / "Office.index.json", "--scoring-rule", "trie", "--histories", out / "questions.jsonl")
    done = run("import", out / "checkpoint", *files, *PROMPT, "--out", out / "bundle")
    assert done.exit_code == 0, done.output
    assert f"prompts equal the tokenizer's on {ROWS} of {ROWS} histories" in " ".join(done.output.split())
    asked = ("--checkpoint", out / "checkpoint", *PROMPT, "--histories", out / "questions.jsonl", "--no-counts")
    done = run("bench", "parity", "--bundle", out / "bundle", *asked, "--users", 10, "-k", 5, "--json", out / "p.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "p.json").read_text())["rows"]
    assert {(row["users"], row["different"], row["prompts_different"]) for row in rows} == {(10, 0, 0)}
