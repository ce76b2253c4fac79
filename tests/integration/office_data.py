"""Items and histories in the form of Amazon Office, and the example scripts that read them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples"
ITEMS, ROWS = 60, 80


def prepare(data: Path, out: Path) -> None:
    """Write DATA and run prepare.py. Users walk through the items one by one, so there is something to learn."""
    data.mkdir()
    rng = np.random.default_rng(3)
    _write(
        data / "items.jsonl",
        [{"id": n, "title": f"Item number {n}", "codes": [n % 5, n // 5, int(rng.integers(9))]} for n in range(ITEMS)],
    )
    for name in ("valid", "test"):
        starts = rng.integers(ITEMS, size=ROWS).tolist()
        walks = [[(start + step) % ITEMS for step in range(4)] for start in starts]
        _write(data / f"{name}.jsonl", [{"history": walk[:-1], "target": walk[-1]} for walk in walks])
    done = script("office/prepare.py", data, out)
    assert done.returncode == 0, done.stderr


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of examples/ on one thread."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True)


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
