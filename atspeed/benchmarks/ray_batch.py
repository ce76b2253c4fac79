"""Lists per second of a Ray Data job by its number of workers (extra `ray`).

Each job starts its workers anew, which takes seconds. The clock therefore starts after as many blocks of
lists as there are workers, and only later lists count. The numbers of workers are measured in turn. A worker has one thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from atspeed.benchmarks.batch import RATES
from atspeed.benchmarks.results import BenchmarkError, Columns
from atspeed.benchmarks.services import progress_bar

NAME = "ray"
_BLOCKS = 16  # blocks of users for each worker


@dataclass(frozen=True)
class RayConfig:
    """Configuration of the measurement. users: users of each job. turns: jobs for each number of workers."""

    k: int = 20
    users: int = 4_096
    turns: int = 3
    concurrency: int = 16


@dataclass(frozen=True)
class RayRow:
    """Rates of one number of workers. per_second: lists a second, of each turn. of_first: its median over the first row's."""

    workers: int
    per_second: list[float]
    of_first: float


COLUMNS: Columns[RayRow] = (
    ("workers", lambda row: str(row.workers)),
    *RATES,
    ("of the first row", lambda row: f"{row.of_first:.2f}"),
)


def run(root: Path, histories: Sequence[Sequence[str]], workers: Sequence[int], config: RayConfig) -> list[RayRow]:
    """Measure each number of workers on a cluster of this machine. Raises BenchmarkError for users without a list."""
    import ray

    rates: dict[int, list[float]] = {count: [] for count in workers}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=max(workers), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with progress_bar() as bar:
            for _ in bar.track(range(config.turns), description="turns"):
                for count in workers:
                    rates[count].append(_rate(root, histories, count, config))
    finally:
        ray.shutdown()
    base = median(rates[workers[0]])
    return [RayRow(count, found, round(median(found) / base, 3)) for count, found in rates.items()]


def header(config: RayConfig) -> dict[str, Any]:
    """Return the header's fields."""
    return {"benchmark": NAME, "question": {**asdict(config), "threads": 1}}


def _rate(root: Path, histories: Sequence[Sequence[str]], workers: int, config: RayConfig) -> float:
    import ray

    from atspeed.batch.ray_lists import lists_of

    rows = [{"user_id": str(number), "history": list(one)} for number, one in enumerate(histories[: config.users])]
    users = ray.data.from_items(rows, override_num_blocks=_BLOCKS * workers)
    options = {"k": config.k, "beam_width": config.k}
    lists = lists_of(users, root, options, workers=workers, threads=1, concurrency=config.concurrency)
    counted, failed, begun = 0, 0, 0.0
    blocks: Any = lists.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for number, block in enumerate(blocks):
        failed += sum(map(bool, block["error"].to_pylist()))
        if number < workers:
            begun = time.perf_counter()
        else:
            counted += len(block["user_id"])
    seconds = time.perf_counter() - begun
    if failed:
        raise BenchmarkError(f"{failed} of {config.users} users got no list")
    if not counted:
        raise BenchmarkError(f"{config.users} users are too few for {workers} workers")
    return round(counted / seconds, 2)
