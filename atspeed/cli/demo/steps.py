"""The steps of the demonstration, over running services."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from atspeed.cli.demo.checks import Checks, same_list
from atspeed.cli.demo.speed import PLAIN, STRICT, Pair, choice, compare, slower, speed_table
from atspeed.cli.demo.token_tree import TokenTree
from atspeed.cli.display import milliseconds
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.search.mode import Mode
from atspeed.local.recommender import Recommender, RecommenderOptions
from atspeed.local.stack import LocalStack
from atspeed.training.data import Case, Movie
from atspeed_client import AsyncClient, Recommendation, RecommendRequest
from orchestrator.planning.planner import PlanLimits, PlannerKind

_WIDTHS = (1, 10, 20)  # K of the table
_TOLERANCE, _SEED, _K = 0.1, 7, 10  # arbitrary, within the services' limits
_SHOWN_MOVIES = 5
_TREE_K = 5  # a tree that fits on a screen


@dataclass(frozen=True)
class DemoScale:
    """The size of the demonstration.

    Attributes:
        shown: users whose lists are printed.
        compared: users in the table.
        widths: the values of K.
        rounds: lists of each user, K and mode in the table.
    """

    shown: int = 2
    compared: int = 6
    widths: Sequence[int] = _WIDTHS
    rounds: int = 2


@dataclass
class Demo:
    """The steps of the demonstration. shipped: the bundle whose target is served in its inflated form."""

    console: Console
    client: AsyncClient
    stack: LocalStack
    shipped: Bundle
    movies: Mapping[str, Movie]
    users: Sequence[Case]
    scale: DemoScale
    checks: Checks = field(default_factory=Checks)

    async def run(self) -> None:
        """Run all steps in order."""
        await self.record_histories()
        for case in self.users[: self.scale.shown]:
            await self.show(case)
        pairs = await self.compare_speed()
        await self.compare_modes()
        await asyncio.to_thread(self.search_in_process, pairs)
        await self.kill_draft(pairs)

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
        strict, plain = [
            await self.client.recommend(_user_id(case), k=_SHOWN_MOVIES, mode=mode, exclude_seen=True)
            for mode in (STRICT, PLAIN)
        ]
        same = self.checks.same(f"user {case.user}: strict", strict, plain)
        self.console.print(f"\n[bold]User {case.user}[/bold] watched last: {watched}", highlight=False)
        self.console.print(self.movies_table(strict))
        self.console.print(
            f"watched next (held out): {self._next(case, strict)}\n{_took(strict)}\n"
            f"plain beam search (target-only): {_took(plain)}\nidentical to target-only: [bold]{_yes(same)}[/bold]",
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

    async def compare_speed(self) -> dict[int, Pair]:
        """Time plain beam search and strict speculation, check that the lists are the same, and print the table."""

        async def ask(user: int, mode: Mode, k: int) -> Recommendation:
            return await self._ask(self.users[user], mode, k)

        with self.console.status("timing plain beam search and strict speculation, in turns"):
            pairs = await compare(ask, len(self.users), self.scale.widths, self.scale.rounds)
        for k, pair in pairs.items():
            for number, (strict, plain) in enumerate(zip(pair.strict, pair.plain, strict=True)):
                case = self.users[number % len(self.users)]
                self.checks.same(f"user {case.user}, K = {k}: strict", strict, plain)
        title = (
            f"\nTime of a list on this machine: medians of {len(self.users)} users, {self.scale.rounds} times each, in turns, "
            "prompts cached"
        )
        self.console.print(speed_table(pairs, title))
        self._say("The planner chose:")
        for k, pair in pairs.items():
            self._say(f"  {choice(k, pair)}")
        if said := slower(pairs):
            self._say(said)
        return pairs

    async def compare_modes(self) -> None:
        """Request every mode at one K, check the tolerance, and print a line for each."""
        lines, alone = Table(box=box.SIMPLE_HEAD), [await self._ask(case, PLAIN, _K) for case in self.users]
        for name in (f"mode, K = {_K}", "target passes", "p50 ms", "same list as plain"):
            lines.add_column(name, justify="left" if name.startswith("mode") else "right")
        for mode in (mode for mode in Mode if mode is not PLAIN):
            lists = [await self._ask(case, mode, _K) for case in self.users]
            same = statistics.mean(same_list(*pair) for pair in zip(lists, alone, strict=True))
            passes = statistics.mean(reply.statistics.target_passes for reply in lists)
            ms = statistics.median(map(milliseconds, lists))
            lines.add_row(str(mode), f"{passes:.2f}", f"{ms:.1f}", f"{100 * same:.0f} %")
            for case, reply in zip(self.users, lists, strict=True):
                slack = reply.exactness.largest_slack
                self.checks.that(
                    f"user {case.user}: {mode}, tolerance kept",
                    slack <= (_TOLERANCE if mode is Mode.TOLERANCE else 0.0),
                )
        self.console.print(lines)
        self._say(f"Lists of the sampling modes are random, so they differ. Tolerance {_TOLERANCE}.")

    def search_in_process(self, pairs: Mapping[int, Pair]) -> None:
        """Search with the shipped target in this process: compare the lists, and draw the tree of one."""
        asked = pairs[_TREE_K].nodes_asked if _TREE_K in pairs else 0
        limits = PlanLimits(kind=PlannerKind.FIXED)
        if asked:
            limits = PlanLimits(kind=PlannerKind.FIXED, nodes_per_beam=asked / _TREE_K / (self._levels - 1))
        with Recommender(self.shipped.root, RecommenderOptions(plan_limits=limits, warm_up_seconds=0.2)) as recommender:
            for k, pair in pairs.items():
                for case, larger in zip(self.users, pair.plain, strict=False):
                    small = recommender.recommend(case.history, **_options(PLAIN, k))
                    self.checks.alike(f"user {case.user}, K = {k}: list of the shipped target", larger, small)
            self._say("The inflated target's lists are those of the shipped target: see the checks.")
            case = self.users[0]
            request = RecommendRequest(history=case.history, **_options(STRICT, _TREE_K))
            tree = TokenTree(recommender.diagnose(request), recommender.catalogue, self.movies)
        size = "the planner's size" if asked else "a fixed size, since the planner drafts none here"
        self.console.print(f"\n[bold]The token tree[/bold] of user {case.user}, K = {_TREE_K}, a plan of {size}:")
        self._say("The beam is K wide and seen movies may return, so the list is another one than above.")
        self.console.print(tree.drawn())
        self.console.print(tree.counts())

    async def kill_draft(self, pairs: Mapping[int, Pair]) -> None:
        """Kill the draft and check that the lists stay the same, in more passes, and that replies which wanted a plan say so."""
        k = max((k for k, pair in pairs.items() if pair.nodes_asked), default=max(pairs))
        modes = (STRICT, Mode.EXACT_SAMPLING)
        before = {mode: [await self._ask(case, mode, k) for case in self.users] for mode in modes}
        for draft in self.stack.drafts:
            draft.kill()
        self._say("\nkilled the draft (SIGKILL)")
        for mode in modes:
            without = [await self._ask(case, mode, k) for case in self.users]
            same = [
                self.checks.same(f"user {case.user}: {mode} without the draft", now, earlier)
                for case, now, earlier in zip(self.users, without, before[mode], strict=True)
            ]
            said = all(reply.degraded or not reply.statistics.nodes_asked for reply in without)
            self.checks.that(f"{mode}: degraded is set where a plan was wanted", said)
            then, now = (
                statistics.mean(r.statistics.target_passes for r in lists) for lists in (before[mode], without)
            )
            seeded = f", seed {_SEED}" if mode.samples else ""
            self._say(
                f"  {mode}{seeded}, K = {k}: same list for {sum(same)} of {len(same)} users, "
                f"{sum(reply.degraded for reply in without)} say `degraded`, {now:.2f} target passes; {then:.2f} before"
            )

    @property
    def _levels(self) -> int:
        return self.shipped.catalogue().trie.levels

    async def _ask(self, case: Case, mode: Mode, k: int) -> Recommendation:
        return await self.client.recommend(_user_id(case), **_options(mode, k))

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


def _user_id(case: Case) -> str:
    return f"movielens-100k-{case.user}"


def _yes(answer: bool) -> str:
    return "yes" if answer else "NO"
