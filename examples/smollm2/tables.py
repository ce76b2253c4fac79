"""Prints the tables of README.md from the results of `make smollm2`.

python examples/smollm2/tables.py examples/smollm2/results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def training(epochs: Sequence[dict[str, Any]]) -> None:
    """Print the held-out loss by epoch and level."""
    levels = len(epochs[0]["held_out_loss_per_level"])
    table(
        ("epoch", *(f"level {level + 1}" for level in range(levels)), "item"),
        [
            (
                str(row["epoch"]),
                *(f"{loss:.2f}" for loss in row["held_out_loss_per_level"]),
                f"{sum(row['held_out_loss_per_level']):.2f}",
            )
            for row in epochs
        ],
    )


def recall(rows: Sequence[dict[str, Any]]) -> None:
    """Print Recall@10 with 95 % intervals."""
    table(
        ("list of 10", "questions", "Recall@10", "difference to item-kNN"),
        [
            (
                row["method"],
                f"{row['questions']:,}",
                f"{row['recall']:.3f} ± {row['half_width']:.3f}",
                f"{row['to_knn']:+.3f} ± {row['to_knn_half_width']:.3f}",
            )
            for row in rows
        ],
    )


def passes(rows: Sequence[dict[str, Any]]) -> None:
    """Print the target passes of a list by K and by the nodes of a plan."""
    widths = list(dict.fromkeys(row["k"] for row in rows))
    found = {(row["plan"], row["k"]): row for row in rows}
    table(
        ("plan", *(f"K = {k}: passes, nodes (used)" for k in widths)),
        [
            (
                plan,
                *(
                    f"{row['target_passes']:.2f} ± {row['half_width']:.2f}, {row['nodes']:.0f} ({row['used']:.0f})"
                    for row in (found[plan, k] for k in widths)
                ),
            )
            for plan in dict.fromkeys(row["plan"] for row in rows)
        ],
    )


def times(folder: Path) -> None:
    """Print the median time of a list beside `generate`, and the passes of each mode. A bundle is a column pair."""
    measured = {path.stem: _rows(path) for path in sorted(folder.glob("float32*.json"))}
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


def results(folder: Path, pattern: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of the result files of a folder."""
    for path in sorted(folder.glob(pattern)):
        yield json.loads(path.read_text(encoding="utf-8"))


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for epochs in results(folder, "training.json"):
        training(epochs)
    # Item-kNN and popularity are in every file.
    if rows := {row["method"]: row for file in results(folder, "recall-*.json") for row in file}:
        recall(list(rows.values()))
    for file in results(folder, "passes.json"):
        passes(file)
    times(folder)


if __name__ == "__main__":
    main()
