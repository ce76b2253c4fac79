"""Writes Amazon Office in the formats that checkpoints' authors and `atspeed` read.

    python examples/office/prepare.py DATA OUT

DATA holds items.jsonl ({id, title, codes}), valid.jsonl and test.jsonl ({history, target}). The script writes

    OUT/Office.index.json       item -> its code tokens
    OUT/titles.json             item -> its title
    OUT/histories.jsonl         histories to learn from: {user, items}, oldest first
    OUT/questions.jsonl         other histories with their next item: {user, items, target}

The training file of MiniOneRec is not published with its other files. So models learn from the histories of valid.jsonl. Its rows
are the steps of users: a row often continues the row before it. Such rows are joined, so that no event counts twice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WINDOW = 10  # items that a row keeps of a history


def read(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[object]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def code_tokens(codes: Sequence[int]) -> list[str]:
    """Return an item's code tokens: <a_60>, <b_159>, <c_203>."""
    return [f"<{letter}_{code}>" for letter, code in zip("abcdefgh", codes, strict=False)]


def joined(rows: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Return the histories of rows with their targets. A row that continues the one before it becomes a part of it."""
    histories: list[list[str]] = []
    for row in rows:
        history, target = [str(item) for item in row["history"]], str(row["target"])
        if histories and histories[-1][-WINDOW:] == history:
            histories[-1].append(target)
        else:
            histories.append([*history, target])
    return histories


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    items = read(options.data / "items.jsonl")
    index = {str(item["id"]): code_tokens(item["codes"]) for item in items}
    titles = {str(item["id"]): item["title"] for item in items}
    (options.out / "Office.index.json").write_text(json.dumps(index), encoding="utf-8")
    (options.out / "titles.json").write_text(json.dumps(titles), encoding="utf-8")
    histories = joined(read(options.data / "valid.jsonl"))
    write(options.out / "histories.jsonl", ({"user": f"u{n}", "items": items} for n, items in enumerate(histories)))
    questions = read(options.data / "test.jsonl")
    write(
        options.out / "questions.jsonl",
        (
            {"user": f"q{n}", "items": [str(item) for item in row["history"]], "target": str(row["target"])}
            for n, row in enumerate(questions)
        ),
    )
    print(f"{options.out}: {len(index):,} items, {len(histories):,} histories, {len(questions):,} questions")


if __name__ == "__main__":
    main()
