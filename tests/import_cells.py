"""Imported checkpoints of every layout and family beside Hugging Face `generate` on the authors' own prompts.

    python -m tests.import_cells --users 100 --rows var/imports.jsonl

prints one row per layout and family. The models are small and random; their tokenizers are real. Rows that the
file has of this revision of the code are not measured again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from atspeed.benchmarks.near_ties import Verdict, compare
from atspeed.benchmarks.provenance import revision
from atspeed.benchmarks.services import ServiceOptions, ask, progress_bar, services
from atspeed.engine.search.list_comparison import RankedList, largest_gap
from atspeed.engine.search.mode import Mode
from atspeed.importing.layouts import LAYOUTS
from atspeed_client import RecommendRequest
from tests.authors_prompts import PROMPTS, tokens_of_tail
from tests.checkpoints import MadeCheckpoint, make_checkpoint, random_paths
from tests.command_line import run
from tests.generated import generated

WIDTHS = (1, 10, 20, 50)
MODES = (Mode.TARGET_ONLY, Mode.STRICT)
_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True},
    "llama": {},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
}
_TOKENIZERS = {"lc-rec": "unigram", "minionerec": "bpe", "mimigenrec": "bpe", "openonerec": "bpe"}
_OF_ONE_LAYOUT = {"openonerec": {"names": ["<|sid_begin|>", "<|sid_end|>"], "max_position_embeddings": 4096}}


@dataclass(frozen=True)
class Cell:
    """One import.

    Attributes:
        layout: of `LAYOUTS`.
        architecture: the model family.
        tail: whether the layout's tail is scored.
        tokenizer: of `tests.checkpoints`.
        settings: of `make_checkpoint`.
    """

    layout: str
    architecture: str
    tail: bool
    tokenizer: str
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.layout}-{self.architecture}-{'tail' if self.tail else 'no-tail'}"


CELLS = [
    Cell(layout, architecture, tail, tokenizer, settings | _OF_ONE_LAYOUT.get(layout, {}))
    for layout, tokenizer in _TOKENIZERS.items()
    for architecture, settings in _SETTINGS.items()
    for tail in (True, False)
    if LAYOUTS[layout].tail or not tail
]
CELLS += [Cell("letter-tiger", "t5", tail, "t5") for tail in (True, False)]


@dataclass(frozen=True)
class Compared:
    """A served list beside that of `generate`. gap: the largest difference of scores at one rank."""

    k: int
    mode: Mode
    verdict: Verdict
    gap: float


def imported(made: MadeCheckpoint, out: Path, *options: object) -> Path:
    """Import a checkpoint by the command."""
    files = ("--index", made.index, "--histories", made.histories, "--out", out)
    done = run("import", made.folder, *files, *options)
    assert done.exit_code == 0, done.output
    assert f"equal the tokenizer's on {len(made.users)} of {len(made.users)} histories" in done.output
    return out


async def compared(cell: Cell, folder: Path, users: int, widths: Sequence[int] = WIDTHS) -> list[Compared]:
    """Import a made checkpoint and compare every user's lists, of the target alone and with speculation."""
    made = make_checkpoint(
        folder, random_paths(60, 3), architecture=cell.architecture, tokenizer=cell.tokenizer, users=max(40, users),
        **cell.settings,
    )  # fmt: skip
    bundle = imported(made, folder / "bundle", "--prompt", cell.layout, *([] if cell.tail else ["--no-tail"]))
    tail = tokens_of_tail(cell.layout, made.tokenizer) if cell.tail else []
    histories = made.users[:users]
    prompts = [PROMPTS[cell.layout](made.tokenizer, made.paths, history) for history in histories]
    found = list[Compared]()
    async with services(bundle, ServiceOptions(planner="fixed")) as client:
        for k in widths:
            expected = [generated(made, prompt, tail, k) for prompt in prompts]
            for mode in MODES:
                requests = [RecommendRequest(history=user, k=k, beam_width=k, mode=mode) for user in histories]
                with progress_bar() as progress:
                    replies = await ask(client, requests, progress=progress, title="lists")
                for reply, wanted in zip(replies, expected, strict=True):
                    actual = RankedList.of(reply.items)
                    found.append(Compared(k, mode, compare(actual, wanted), largest_gap(actual, wanted)))
    return found


def _row(cell: Cell, found: Sequence[Compared]) -> str:
    """A row of the table: identical lists per K, with near-ties in brackets."""
    columns = []
    for k in dict.fromkeys(one.k for one in found):
        verdicts = [one.verdict for one in found if one.k == k]
        ties, other = verdicts.count(Verdict.NEAR_TIE), verdicts.count(Verdict.DIFFERENT)
        count = f"{verdicts.count(Verdict.IDENTICAL)} of {len(verdicts)}"
        columns.append(count + (f", {ties} near-ties" if ties else "") + (f", {other} DIFFERENT" if other else ""))
    tail = "scored" if cell.tail else ("dropped" if LAYOUTS[cell.layout].tail else "none")
    gap = max(one.gap for one in found)
    return f"| {' | '.join([f'`{cell.layout}`', cell.architecture, tail, *columns, f'{gap:.0e}'])} |"


def main() -> None:
    """Print the table. Exits with 1 if a list differs beyond near-ties."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--rows", type=Path, required=True, help="File of finished rows, one JSON object per line.")
    arguments = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)  # a pass of these models is too short for two: they wait for each other
    titles = ["layout", "family", "tail", *(f"K = {k}" for k in WIDTHS), "score gap"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)  # noqa: T201 - the table is the result
    arguments.rows.touch()
    rows = [json.loads(line) for line in arguments.rows.read_text(encoding="utf-8").splitlines()]
    finished = {(row["cell"], row["users"], row["revision"]): row for row in rows}
    code, different = revision(), 0
    for cell in CELLS:
        key = (str(cell), arguments.users, code)
        if key not in finished:
            with tempfile.TemporaryDirectory() as folder:
                found = asyncio.run(compared(cell, Path(folder), arguments.users))
            count = sum(one.verdict is Verdict.DIFFERENT for one in found)
            finished[key] = dict(zip(("cell", "users", "revision"), key, strict=True)) | {
                "different": count,
                "row": _row(cell, found),
            }
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finished[key]) + "\n")
        print(finished[key]["row"], flush=True)  # noqa: T201
        different += finished[key]["different"]
    raise SystemExit(different > 0)


if __name__ == "__main__":
    main()
