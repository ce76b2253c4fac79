"""Prints the tables of README.md from the results of `make smollm2`.

python examples/smollm2/tables.py examples/smollm2/results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMATS = ("float32", "int8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def recall(rows: Sequence[dict[str, Any]]) -> None:
    """Print Recall@10 with 95 % intervals."""
    table(
        ("list of 10", "Recall@10", "difference to item-kNN", "target passes", "lists with a draft's plan"),
        [
            (
                row["method"],
                f"{row['recall']:.3f} ± {row['half_width']:.3f}",
                f"{row['to_knn']:+.3f} ± {row['to_knn_half_width']:.3f}",
                f"{row['target_passes']:.2f}" if row["target_passes"] else "",
                f"{row['asked_draft']:.0%}" if row["target_passes"] else "",
            )
            for row in rows
        ],
    )


def times(folder: Path) -> None:
    """Print the median time of a list beside `generate`, and the passes of each mode. A bundle is a column pair."""
    measured = {path.stem: _rows(path) for path in sorted(folder.glob("*.json")) if path.stem.split("-")[0] in FORMATS}
    for name, rows in measured.items():
        print(f"\n{name}, median ms:")
        peers = {row["k"]: row for row in rows if row["engine"] == "transformers"}
        own = {(row["k"], row["mode"], row["prefix"]): row for row in rows if row["engine"] == "atspeed"}
        table(
            ("K", "`generate`", "plain, cold", "strict, cold", "plain, warm", "strict, warm", "generate / strict, cold",
             "generate / strict, warm", "passes of strict"),
            [
                (
                    str(k),
                    f"{peer['p50_ms']:,.0f}",
                    *(
                        f"{own[k, mode, prefix]['p50_ms']:,.0f}"
                        for prefix in ("cold", "warm")
                        for mode in ("target-only", "strict")
                    ),
                    *(f"{own[k, 'strict', prefix]['speedup_vs_hf']:.1f}" for prefix in ("cold", "warm")),
                    f"{own[k, 'strict', 'cold']['target_passes_mean']:.2f}",
                )
                for k, peer in peers.items()
            ],
        )  # fmt: skip


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if (folder / "recall.json").exists():
        recall(json.loads((folder / "recall.json").read_text(encoding="utf-8")))
    times(folder)


if __name__ == "__main__":
    main()
