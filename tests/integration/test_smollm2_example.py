"""The SmolLM2 example on a made-up base: fine-tuning that stops and resumes, its adapter imported, lists compared."""

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
    fixed = ("--epochs", 2, "--rank", 4, "--held", 10, "--learning-rate", 1e-2, "--batch-tokens", 1024)
    return script("smollm2/fine_tune.py", base, out, *fixed, *options)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter, with the base that it belongs to."""
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
    assert "stopped after step 1;" in stopped.stdout
    assert fine_tune(out / "base-model", tmp_path).returncode == 0
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_the_adapter_is_imported_and_its_lists_are_those_of_generate(out: Path) -> None:
    """On the user's own tokenised text, in float32; and the same adapter in int8."""
    files = (
        *("--adapter", out / "adapter", "--index", out / "Office.index.json", "--scoring-rule", "trie"),
        *("--histories", out / "questions.jsonl"),
    )
    done = run(
        "import", out / "base", *files, *PROMPT, "--out", out / "bundle", "--save-checkpoint", out / "checkpoint"
    )
    assert done.exit_code == 0, done.output
    assert f"prompts equal the tokenizer's on {ROWS} of {ROWS} histories" in " ".join(done.output.split())
    asked = ("--checkpoint", out / "checkpoint", *PROMPT, "--histories", out / "questions.jsonl", "--no-counts")
    done = run("bench", "parity", "--bundle", out / "bundle", *asked, "--users", 10, "-k", 5, "--json", out / "p.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "p.json").read_text())["rows"]
    assert {(row["users"], row["different"], row["prompts_different"]) for row in rows} == {(10, 0, 0)}
    done = run("import", out / "base", *files, *PROMPT, "--out", out / "int8", "--precision", "int8")
    assert done.exit_code == 0, done.output
