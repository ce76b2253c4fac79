"""Plain beam search beside strict speculation, in milliseconds on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from atspeed.cli.display import milliseconds
from atspeed.engine.search.mode import Mode
from atspeed_client import Recommendation

PLAIN, STRICT = Mode.TARGET_ONLY, Mode.STRICT
_LEARNING = 17  # lists of each K before the table: the planner decides by observations from the 16th on

Ask = Callable[[int, Mode, int], Awaitable[Recommendation]]
"""Requests a list: user, mode, K."""


@dataclass
class Pair:
    """The lists of one K, in pairs of the same user.

    Attributes:
        plain: by plain beam search.
        strict: by strict speculation.
    """

    plain: list[Recommendation] = field(default_factory=list)
    strict: list[Recommendation] = field(default_factory=list)

    @property
    def plain_ms(self) -> float:
        """Return the median time of plain beam search."""
        return statistics.median(map(milliseconds, self.plain))

    @property
    def strict_ms(self) -> float:
        """Return the median time of strict speculation."""
        return statistics.median(map(milliseconds, self.strict))

    @property
    def is_slower(self) -> bool:
        """Return whether strict took longer than plain."""
        return self.strict_ms > self.plain_ms

    @property
    def nodes_asked(self) -> int:
        """Return the median number of nodes that the planner asked the draft for."""
        return round(statistics.median(reply.statistics.nodes_asked for reply in self.strict))


async def compare(ask: Ask, users: int, widths: Sequence[int], rounds: int) -> dict[int, Pair]:
    """Time every user in both modes, in turns, after lists that the planner learns from. Returns the lists by K."""
    for k in widths:
        for number in range(_LEARNING):
            await ask(number % users, STRICT, k)
    pairs = {k: Pair() for k in widths}
    for turn in range(rounds):
        for user in range(users):
            for k, pair in pairs.items():
                # Each mode comes first in half of the turns.
                for mode in (PLAIN, STRICT) if (turn + user) % 2 else (STRICT, PLAIN):
                    (pair.strict if mode is STRICT else pair.plain).append(await ask(user, mode, k))
    return pairs


def speed_table(pairs: dict[int, Pair], title: str) -> Table:
    """Format the comparison: medians of times, means of passes."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("K", "plain\nms", "strict\nms", "plain /\nstrict", "plain\npasses", "strict\npasses", "nodes\nasked"):
        shown.add_column(name, justify="right")
    for k, pair in pairs.items():
        passes = [
            statistics.mean(reply.statistics.target_passes for reply in lists) for lists in (pair.plain, pair.strict)
        ]
        times = (pair.plain_ms, pair.strict_ms)
        ratio = f"{pair.plain_ms / pair.strict_ms:.2f}"
        shown.add_row(
            str(k), *(f"{ms:.1f}" for ms in times), ratio, *(f"{one:.2f}" for one in passes), str(pair.nodes_asked)
        )
    return shown


def choice(k: int, pair: Pair) -> str:
    """Say what the planner chose for this K, and why."""
    measured = f"measured {pair.strict_ms:.0f}, plain {pair.plain_ms:.0f}"
    if not pair.nodes_asked:
        prefetched = statistics.mean(reply.statistics.nodes_prefetched for reply in pair.strict)
        return (
            f"K = {k}: no draft, since it expects no plan to save 3 % of the target's own time ({measured} ms); "
            f"nodes that the target prefetches: {prefetched:.1f} a list."
        )
    asked = [reply.statistics for reply in pair.strict if reply.statistics.nodes_asked]
    expected = statistics.median(one.expected_ms for one in asked)
    passes = statistics.median(one.expected_passes for one in asked)
    plain = statistics.mean(reply.statistics.target_passes for reply in pair.plain)
    return (
        f"K = {k}: {pair.nodes_asked} nodes from the draft, since it expects them to leave {passes:.1f} of {plain:.0f} target "
        f"passes and {expected:.0f} ms, less than without them ({measured} ms)."
    )


def slower(pairs: Mapping[int, Pair]) -> str:
    """Name each K at which strict took longer than plain, by half a percent or more; empty if there is none."""
    longer = {k: round(100 * (pair.strict_ms / pair.plain_ms - 1)) for k, pair in pairs.items() if pair.is_slower}
    found = [f"K = {k}, {percent}%" for k, percent in longer.items() if percent]
    return f"Strict took longer than plain here, on this run: {'; '.join(found)}." if found else ""
