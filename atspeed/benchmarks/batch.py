"""Lists per second of `atspeed batch`, beside the bare searches of the same models.

The bare runner makes target-only searches in a closed loop, without orchestrator, files or library (in_process_baseline.py).
`atspeed batch` reads the users from a file and writes their lists, as the command does. Ways take turns. Each turn has users of
its own, so all prompts are cold.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from atspeed.batch.lists import ListFolder
from atspeed.batch.local_lists import local_lists
from atspeed.batch.run import Batch, Shard
from atspeed.benchmarks.in_process_baseline import InProcessBaseline, in_process_baseline
from atspeed.benchmarks.results import BenchmarkError, Columns
from atspeed.benchmarks.services import progress_bar
from atspeed.engine.search.mode import Mode
from atspeed.local.recommender import Recommender, RecommenderOptions

NAME = "batch"
BARE = "bare runner, target-only"


@dataclass(frozen=True)
class BatchConfig:
    """Configuration of the measurement. concurrency: lists at once. turns: of each way; users: of each turn."""

    k: int = 20
    users: int = 500
    turns: int = 3
    concurrency: int = 16
    threads: int = 2


@dataclass(frozen=True)
class BatchRow:
    """One way to make lists. per_second: lists a second, of each turn. of_bare: median over the bare runner's median."""

    way: str
    per_second: list[float]
    of_bare: float


class HasRates(Protocol):
    """A row with lists per second, one number for each turn."""

    @property
    def per_second(self) -> list[float]:
        """Lists per second of each turn."""


RATES: Columns[HasRates] = (
    ("lists/s, median", lambda row: f"{median(row.per_second):,.1f}"),
    ("least", lambda row: f"{min(row.per_second):,.1f}"),
    ("most", lambda row: f"{max(row.per_second):,.1f}"),
)
COLUMNS: Columns[BatchRow] = (
    ("", lambda row: row.way),
    *RATES,
    ("of the bare runner", lambda row: f"{row.of_bare:.3f}"),
)


async def run(root: Path, histories: Sequence[Sequence[str]], config: BatchConfig) -> list[BatchRow]:
    """Measure each way. histories: `users * turns` of them. Raises BenchmarkError for fewer, or for users without a list."""
    if len(histories) < config.users * config.turns:
        raise BenchmarkError(f"{config.users * config.turns} users are needed, and {len(histories)} were found")
    rates: dict[str, list[float]] = {BARE: [], **{f"atspeed batch, {mode}": [] for mode in _MODES}}
    async with in_process_baseline(root, threads=config.threads) as bare:
        with Recommender(root, RecommenderOptions(threads=config.threads)) as recommender, progress_bar() as bar:
            for turn in bar.track(range(config.turns), description="turns"):
                chosen = histories[turn * config.users : (turn + 1) * config.users]
                rates[BARE].append(await _bare(bare, chosen, config))
                for mode in _MODES:
                    rate = await asyncio.to_thread(_batch, recommender, chosen, mode, config)
                    rates[f"atspeed batch, {mode}"].append(rate)
    base = median(rates[BARE])
    return [BatchRow(way, found, round(median(found) / base, 4)) for way, found in rates.items()]


def header(config: BatchConfig) -> dict[str, Any]:
    """Return the header's fields."""
    return {"benchmark": NAME, "question": asdict(config)}


_MODES = (Mode.TARGET_ONLY, Mode.STRICT)


async def _bare(bare: InProcessBaseline, histories: Sequence[Sequence[str]], config: BatchConfig) -> float:
    prompts = [bare.prompt(history) for history in histories]
    loop = await bare.closed_loop(prompts, config.k, config.concurrency)
    return round(loop.searches_per_second, 2)


def _batch(recommender: Recommender, histories: Sequence[Sequence[str]], mode: Mode, config: BatchConfig) -> float:
    """Return the lists a second of a whole batch: file read, lists made, files written."""
    with tempfile.TemporaryDirectory(prefix="atspeed-bench-") as folder:
        users = Path(folder) / "users.jsonl"
        lines = (json.dumps({"user_id": str(number), "history": list(one)}) for number, one in enumerate(histories))
        users.write_text("\n".join(lines) + "\n", encoding="utf-8")
        work = Batch(users, ListFolder(Path(folder) / "lists", "jsonl"), config.users, Shard())
        options = {"k": config.k, "beam_width": config.k, "mode": mode}
        begun = time.perf_counter()
        work.begin({**options, "mode": mode.value})
        done = work.run(local_lists(recommender, options, concurrency=config.concurrency), lambda _: None)
        seconds = time.perf_counter() - begun
    if done.failed:
        raise BenchmarkError(f"{done.failed} of {done.users} users got no list")
    return round(done.users / seconds, 2)
