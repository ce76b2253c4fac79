"""Import of a large catalogue, with many codes per level: its memory, and its lists beside `generate`.

`make test` imports a smaller one. `make faults` imports 1.5 million items with three levels of 8,192 codes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from atspeed.benchmarks.near_ties import compare
from atspeed.benchmarks.services import ServiceOptions, ask, progress_bar, services
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Mode
from atspeed_client import RecommendRequest
from tests.authors_prompts import minionerec, tokens_of_tail
from tests.checkpoints import MadeCheckpoint, make_checkpoint, random_users

LEVELS, K = 3, 10
# Runs the command, then prints the peak of its memory in bytes.
IMPORT = """
import resource, sys
from atspeed.cli.main import app
sys.argv[0] = "atspeed"
try:
    app()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@dataclass(frozen=True)
class Size:
    """A catalogue: items, codes of a level, histories, and the most memory of its import."""

    items: int
    codes: int
    users: int
    memory: int


SMALL = Size(items=20_000, codes=256, users=10, memory=2 * 2**30)
LARGE = Size(items=1_500_000, codes=8_192, users=100, memory=6 * 2**30)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in kilobytes on Linux only")
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(SMALL, id="small"),
        pytest.param(LARGE, id="large", marks=(pytest.mark.long, pytest.mark.timeout(3600))),
    ],
)
async def test_lists_of_a_large_catalogue_are_those_of_generate(size: Size, tmp_path: Path) -> None:
    codes = np.random.default_rng(1).integers(size.codes, size=(size.items, LEVELS))
    made = made_checkpoint(codes, size, tmp_path)
    assert imported(made, tmp_path / "bundle") < size.memory
    tail = tokens_of_tail("minionerec", made.tokenizer)
    naive = NaiveCatalogue.of(made, codes, tail)
    requests = [RecommendRequest(history=user, k=K, beam_width=K, mode=Mode.STRICT) for user in made.users]
    async with services(tmp_path / "bundle", ServiceOptions(planner="fixed")) as client:
        with progress_bar() as progress:
            replies = await ask(client, requests, progress=progress, title="lists")
    for user, reply in zip(made.users, replies, strict=True):
        wanted = naive.generated(made, minionerec(made.tokenizer, made.paths, user))
        assert str(compare(RankedList.of(reply.items), wanted)) != "different"
        assert [item.score for item in reply.items] == pytest.approx(wanted.scores, abs=1e-3)


def made_checkpoint(codes: npt.NDArray[np.int64], size: Size, folder: Path) -> MadeCheckpoint:
    """A checkpoint with a token for every code, the largest catalogue file, and histories."""
    names = [f"<{'abc'[level]}_{code}>" for level in range(LEVELS) for code in range(size.codes)]
    shared = np.array(names, dtype=object).reshape(LEVELS, size.codes)  # strings that all paths share
    paths = {
        str(item): [shared[level, code] for level, code in enumerate(path)] for item, path in enumerate(codes.tolist())
    }
    made = make_checkpoint(folder, {"0": names}, users=1, max_position_embeddings=1024)
    users = random_users(list(paths)[:1000], size.users, 2)
    made.index.write_text(json.dumps(paths))
    made.histories.write_text("\n".join(json.dumps({"items": user}) for user in users))
    return MadeCheckpoint(made.folder, made.index, made.histories, paths, users, made.tokenizer, made.model)


def imported(made: MadeCheckpoint, out: Path) -> int:
    """Import in a process of its own. Return the peak of its memory, in bytes."""
    files = ("--index", made.index, "--histories", made.histories, "--out", out, "--prompt", "minionerec")
    command = [sys.executable, "-c", IMPORT, "import", made.folder, *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(made.paths):,} items, {LEVELS} codes" in done.stdout
    return int(done.stdout.split("peak ")[1])


@dataclass(frozen=True)
class NaiveCatalogue:
    """The catalogue as sorted token paths, independent of the engine's trie.

    Attributes:
        paths: int64 [items, L], in lexicographic order.
        items: the item of each row.
        tail: the tokens behind every path.
        found: the tokens that may follow, by prefix, as far as they were asked for.
    """

    paths: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    tail: list[int]
    found: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, made: MadeCheckpoint, codes: npt.NDArray[np.int64], tail: list[int]) -> NaiveCatalogue:
        """Sort the paths of all items by their tokens."""
        vocabulary = made.tokenizer.get_vocab()
        tokens = np.stack(
            [
                np.array([vocabulary[f"<{letter}_{code}>"] for code in range(int(codes.max()) + 1)])[codes[:, level]]
                for level, letter in enumerate("abc")
            ],
            axis=1,
        )
        order = np.lexsort(tokens.T[::-1])
        return cls(tokens[order], order, tail)

    def rows(self, path: list[int]) -> tuple[int, int]:
        """Return the rows that begin with some tokens."""
        start, stop = 0, len(self.paths)
        for level, token in enumerate(path[:LEVELS]):
            column = self.paths[start:stop, level]
            start, stop = (start + int(np.searchsorted(column, token, side)) for side in ("left", "right"))
        return start, stop

    def allowed(self, path: list[int]) -> list[int]:
        """Return the tokens that may follow."""
        if len(path) >= LEVELS:
            return [self.tail[len(path) - LEVELS]]
        if tuple(path) not in self.found:
            start, stop = self.rows(path)
            following: list[int] = np.unique(self.paths[start:stop, len(path)]).tolist()
            self.found[tuple(path)] = following or [0]  # the second: below a beam that generate fills in
        return self.found[tuple(path)]

    def generated(self, made: MadeCheckpoint, prompt: list[int]) -> RankedList:
        """The list of `generate` over the trie of these paths."""
        model: Any = made.model
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            prefix_allowed_tokens_fn=lambda _, row: self.allowed(row[len(prompt) :].tolist()),
            max_new_tokens=LEVELS + len(self.tail),
            num_beams=K,
            num_return_sequences=K,
            length_penalty=0.0,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found: list[tuple[str, float]] = []
        for row, score in zip(
            output.sequences[:, len(prompt) :].tolist(), output.sequences_scores.tolist(), strict=True
        ):
            start, stop = self.rows(row)
            found += [(item, score) for item in sorted(map(str, self.items[start:stop].tolist()), key=str.encode)]
        return RankedList(tuple(item for item, _ in found[:K]), tuple(score for _, score in found[:K]))
