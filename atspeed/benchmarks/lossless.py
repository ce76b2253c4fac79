"""Strict speculation against the target's own beam search, through the real services, with items excluded.

Excluded items matter only where they would have been recommended: half of each user's are drawn from the list that the user gets
without exclusions, the rest from the whole catalogue. Both modes get the same request. A path counts as invalid when its
item is excluded, or is not under that path in the catalogue.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.progress import Progress
from rich.table import Table

from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.services import Running, ask, mean, progress_bar, services
from atspeed.client.recommender import RecommenderClient, recommend_request
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Bundle, write_manifest
from atspeed.engine.search.list_comparison import RankedList, Verdict, compare
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.scoring import ScoringRule
from atspeed.v1 import recommendation_pb2 as pb

REFERENCE = "target-only"
_MODES = (Mode.TARGET_ONLY, Mode.STRICT)


@dataclass(frozen=True)
class LosslessRow:
    """One scoring rule. *_passes_mean: target passes of a request."""

    rule: str
    k: int
    excluded: int
    users: int
    identical: int
    near_ties: int
    different: int
    invalid_paths: int
    target_only_passes_mean: float
    strict_passes_mean: float
    accepted_levels_mean: float


@dataclass(frozen=True)
class Question:
    """What every user is asked: K items with so many excluded. seed: of the choice of excluded items."""

    k: int
    excluded: int
    seed: int


async def run(
    root: Path, histories: Sequence[History], question: Question, rules: Sequence[ScoringRule]
) -> list[LosslessRow]:
    """Compare under each rule; the bundle's own rule or, on a copy of the bundle, the other."""
    rows = []
    for rule in rules:
        with _under_rule(root, rule) as folder, progress_bar() as progress:
            async with services(folder, Running(planner="fixed")) as client:
                rows.append(await _compare(client, Bundle(folder), histories, question, progress))
    return rows


def table(rows: Sequence[LosslessRow]) -> Table:
    """The rows, for people."""
    asked = f"K = {rows[0].k}, {rows[0].excluded} excluded items, {rows[0].users} users" if rows else ""
    shown = Table(title=f"Strict beside target-only: {asked}", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("rule", "same", "near\nties", "differ", "invalid\npaths"):
        shown.add_column(name, justify="left" if name == "rule" else "right")
    for name in ("target-only\npasses", "strict\npasses", "levels\naccepted"):
        shown.add_column(name, justify="right")
    for row in rows:
        counts = (row.identical, row.near_ties, row.different, row.invalid_paths)
        means = (row.target_only_passes_mean, row.strict_passes_mean, row.accepted_levels_mean)
        shown.add_row(row.rule, *map(str, counts), *(f"{value:.2f}" for value in means))
    return shown


def to_json(rows: Sequence[LosslessRow]) -> list[dict[str, Any]]:
    """The rows, for a result file."""
    return [asdict(row) for row in rows]


async def _compare(
    client: RecommenderClient, bundle: Bundle, histories: Sequence[History], question: Question, progress: Progress
) -> LosslessRow:
    catalogue, rule, k = bundle.catalogue(), bundle.manifest.scoring_rule, question.k
    excluded = await _excluded(client, catalogue, histories, question, progress)
    replies = {}
    for mode in _MODES:
        requests = [
            recommend_request(history=history, k=k, beam_width=k, mode=mode, excluded=out)
            for history, out in zip(histories, excluded, strict=True)
        ]
        replies[mode] = await ask(client, requests, progress=progress, title=f"rule {rule}, {mode}")
    alone, strict = replies[Mode.TARGET_ONLY], replies[Mode.STRICT]
    verdicts = [compare(RankedList.of(a.items), RankedList.of(b.items)) for a, b in zip(strict, alone, strict=True)]
    return LosslessRow(
        rule=str(rule),
        k=k,
        excluded=question.excluded,
        users=len(verdicts),
        identical=verdicts.count(Verdict.IDENTICAL),
        near_ties=verdicts.count(Verdict.NEAR_TIE),
        different=verdicts.count(Verdict.DIFFERENT),
        invalid_paths=sum(
            invalid_paths(reply, out, catalogue)
            for lists in replies.values()
            for reply, out in zip(lists, excluded, strict=True)
        ),
        target_only_passes_mean=mean([reply.statistics.target_passes for reply in alone]),
        strict_passes_mean=mean([reply.statistics.target_passes for reply in strict]),
        accepted_levels_mean=mean([reply.statistics.accepted_levels for reply in strict]),
    )


async def _excluded(
    client: RecommenderClient,
    catalogue: Catalogue,
    histories: Sequence[History],
    question: Question,
    progress: Progress,
) -> list[list[str]]:
    """Each user's excluded items (module docstring)."""
    if not question.excluded:
        return [[] for _ in histories]
    rng = np.random.default_rng(question.seed)
    width = max(question.k, question.excluded)
    requests = [recommend_request(history=history, k=width, mode=Mode.TARGET_ONLY) for history in histories]
    replies = await ask(client, requests, progress=progress, title="choosing what to exclude")
    return [_draw(rng, RankedList.of(reply.items).items, catalogue, question.excluded) for reply in replies]


def _draw(rng: np.random.Generator, recommended: Sequence[str], catalogue: Catalogue, count: int) -> list[str]:
    near = rng.permutation(len(recommended))[: count // 2]
    chosen = [recommended[index] for index in near]
    anywhere = (catalogue.id_of(int(item)) for item in rng.permutation(catalogue.items))
    taken = set(chosen)
    rest = [item for item in anywhere if item not in taken]
    return chosen + rest[: count - len(chosen)]


def invalid_paths(reply: pb.RecommendResponse, excluded: Sequence[str], catalogue: Catalogue) -> int:
    """Items of a reply that are excluded, or that the catalogue does not have under that path."""
    index = catalogue.find([item.item_id for item in reply.items])
    banned = set(excluded)
    return sum(
        position < 0 or item.item_id in banned or list(item.code_path) != catalogue.codes[position].tolist()
        for item, position in zip(reply.items, index.tolist(), strict=True)
    )


@contextmanager
def _under_rule(root: Path, rule: ScoringRule) -> Iterator[Path]:
    """The bundle, or for as long as the block lasts a copy of it whose manifest declares another rule."""
    manifest = Bundle(root).manifest
    if manifest.scoring_rule is rule:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="atspeed-bundle-") as folder:
        copy = Path(folder) / root.resolve().name
        try:
            shutil.copytree(root, copy)
        except (OSError, shutil.Error) as error:
            raise BenchmarkError(f"{root}: cannot be copied for the rule {rule}: {error}") from error
        write_manifest(copy, manifest.model_copy(update={"scoring_rule": rule}))
        yield copy
