"""The worked example, from its data to compared lists, on made items of the same form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import run

ITEMS, ROWS = 60, 80
TRAIN = Path(__file__).parents[2] / "examples" / "office" / "train_checkpoint.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one epoch. Users walk through the items one by one, so there is something to learn."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(3)
    write(
        data / "items.jsonl",
        [{"id": n, "title": f"Item number {n}", "codes": [n % 5, n // 5, int(rng.integers(9))]} for n in range(ITEMS)],
    )
    for name in ("valid", "test"):
        starts = rng.integers(ITEMS, size=ROWS).tolist()
        walks = [[(start + step) % ITEMS for step in range(4)] for start in starts]
        write(data / f"{name}.jsonl", [{"history": walk[:-1], "target": walk[-1]} for walk in walks])
    small = ["--epochs", "1", "--hidden-size", "32", "--layers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, TRAIN, data, out, *small], check=True, env=environment, capture_output=True)
    return out


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_the_example_is_imported_and_its_lists_are_those_of_generate(out: Path) -> None:
    """With the scored line feed and end of text, on the authors' own prompts, at K = 5 in both modes."""
    files = ("--index", out / "Office.index.json", "--histories", out / "questions.jsonl")
    done = run("import", out / "checkpoint", *files, "--prompt", "minionerec", "--out", out / "bundle")
    assert done.exit_code == 0, done.output
    assert f"prompts equal the tokenizer's on {ROWS} of {ROWS} histories" in " ".join(done.output.split())
    asked = ("--checkpoint", out / "checkpoint", "--prompt", "minionerec", "--histories", out / "questions.jsonl")
    done = run("bench", "parity", "--bundle", out / "bundle", *asked, "--users", 10, "-k", 5, "--json", out / "p.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "p.json").read_text())["rows"]
    assert {(row["users"], row["different"], row["prompts_different"]) for row in rows} == {(10, 0, 0)}
