"""Counts of drafts that are named GROUP/SEED: a group's values, and their spelling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

from atspeed.benchmarks.markdown import paragraphs
from atspeed.engine.search.mode import Mode
from research.acceptance import AcceptanceRow
from research.acceptance_search import NO_DRAFT


def groups(rows: Sequence[AcceptanceRow]) -> list[str]:
    """Return the names of the drafts without their seeds."""
    return list(dict.fromkeys(row.draft.partition("/")[0] for row in rows if row.draft != NO_DRAFT))


def passes_of(rows: Sequence[AcceptanceRow], group: str, k: int, budget: str, mode: Mode = Mode.STRICT) -> list[float]:
    """Return the mean target passes of each seed of a group of drafts."""
    wanted = (group, k, budget, str(mode))
    return [
        row.target_passes_mean for row in rows if (row.draft.partition("/")[0], row.k, row.budget, row.mode) == wanted
    ]


def spread(values: Sequence[float]) -> str:
    """Spell the mean of the seeds and their standard deviation; empty without values."""
    around = f" ±{stdev(values):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{around}" if values else ""


def identity(rows: Sequence[AcceptanceRow]) -> Iterator[str]:
    """Yield the paragraph that counts the lists that must be the target's own."""
    speculative = [row for row in rows if row.promises_identity and row.draft != NO_DRAFT]
    identical, ties, different = (
        sum(getattr(row, name) for row in speculative) for name in ("identical", "near_ties", "different")
    )
    yield from paragraphs(
        f"Lists compared with those of the target alone: {identical:,} identical, {ties:,} near-ties, {different:,} different."
    )
