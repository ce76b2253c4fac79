"""Refusals of a T5, or of a model without an encoder, before the weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from atspeed.importing import checkpoint
from atspeed.importing.errors import ImportingError
from tests.checkpoints import make_checkpoint, random_paths
from tests.command_line import run


@pytest.mark.parametrize(
    ("architecture", "tokenizer", "options", "said"),
    [
        ("t5", "t5", ["--max-items", "300"], "512 positions"),
        ("qwen2", "bpe", [], "prompt: no token stands before the history"),
        ("qwen2", "t5", [], "prompt: no token stands before the history"),
    ],
)
def test_the_reason_is_one_line(
    architecture: str, tokenizer: str, options: list[str], said: str, tmp_path: Path
) -> None:
    made = make_checkpoint(tmp_path, random_paths(20, 3), architecture=architecture, tokenizer=tokenizer)
    next(made.folder.glob("*.safetensors")).write_bytes(b"not read")
    files = ("--index", made.index, "--histories", made.histories, "--out", tmp_path / "bundle")
    done = run("import", made.folder, *files, "--prompt", "letter-tiger", *options)
    assert done.exit_code == 1
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "bundle").exists()


def test_the_package_that_a_slow_tokenizer_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers itself names another one."""
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr(checkpoint, "find_spec", lambda _: None)
    with pytest.raises(ImportingError, match=r"no tokenizer\.json.*pip install sentencepiece"):
        checkpoint.load_tokenizer(tmp_path)
