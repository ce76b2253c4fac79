"""Comparison of strict lists with target-only lists, with exclusions.

Exclusions matter only where the items would have been recommended. So half of each user's exclusions are drawn from the list
that the user gets without exclusions, the rest from the whole catalogue. Both modes get the same request. A path is invalid
if its item is excluded, or has another path in the catalogue.

The target-only list comes first. The strict list then computes its prefix again, or reads it from memory or Redis, where the
target-only list has left it.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from rich.progress import Progress

from atspeed.benchmarks.histories import History, user_fields
from atspeed.benchmarks.near_ties import compare_bits
from atspeed.benchmarks.results import COMPARISON_COLUMNS, BenchmarkError, Columns, comparison_counts
from atspeed.benchmarks.services import ServiceOptions, ask, mean, progress_bar, services
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import write_manifest
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.scoring import ScoringRule
from atspeed_client import AsyncClient, Recommendation, RecommendRequest

REFERENCE = "target-only"
_WRITE_SECONDS = 2.0  # writes to Redis end after the reply, and strict lists read them
_MODES = (Mode.TARGET_ONLY, Mode.STRICT)


class Prefix(StrEnum):
    """The place of the prefix of strict lists."""

    COLD = "cold"
    MEMORY = "memory"
    REDIS = "redis"


_SETTINGS: dict[Prefix, dict[str, object]] = {
    Prefix.COLD: {"kv-memory-mb": 0, "kv-redis": "never"},
    Prefix.MEMORY: {},
    Prefix.REDIS: {"kv-memory-mb": 0, "kv-redis": "always"},
}


@dataclass(frozen=True)
class LosslessRow:
    """Lists under one scoring rule.

    Attributes:
        cached_tokens_mean: prompt tokens of a strict list from the place of `prefix`, 0 where it is cold.
        target_only_passes_mean, strict_passes_mean: target passes of a request.
    """

    rule: str
    prefix: str
    k: int
    excluded: int
    users: int
    identical: int
    near_ties: int
    different: int
    invalid_paths: int
    cached_tokens_mean: float
    target_only_passes_mean: float
    strict_passes_mean: float
    accepted_levels_mean: float


COLUMNS: Columns[LosslessRow] = (
    ("rule", lambda row: row.rule),
    ("prefix", lambda row: row.prefix),
    ("K", lambda row: str(row.k)),
    ("cached tokens", lambda row: f"{row.cached_tokens_mean:.1f}"),
    *COMPARISON_COLUMNS,
    ("invalid paths", lambda row: str(row.invalid_paths)),
    ("target-only passes", lambda row: f"{row.target_only_passes_mean:.2f}"),
    ("strict passes", lambda row: f"{row.strict_passes_mean:.2f}"),
    ("levels accepted", lambda row: f"{row.accepted_levels_mean:.2f}"),
)


@dataclass(frozen=True)
class LosslessConfig:
    """Configuration of the comparison.

    Attributes:
        widths: the values of K.
        prefixes: the places of the prefixes.
        excluded: excluded items of each user.
        seed: seed of their choice.
    """

    widths: Sequence[int]
    prefixes: Sequence[Prefix]
    excluded: int
    seed: int


async def run(
    root: Path, histories: Sequence[History], config: LosslessConfig, rules: Sequence[ScoringRule]
) -> AsyncIterator[LosslessRow]:
    """Compare under each rule, with each prefix and K. A rule is the bundle's own, or another on a copy of the bundle."""
    for rule in rules:
        with _under_rule(root, rule) as folder, progress_bar() as progress:
            for prefix in config.prefixes:
                options = ServiceOptions(planner="fixed", models=_SETTINGS[prefix])
                async with services(folder, options) as client:
                    for k in config.widths:
                        part = _Part(prefix, k, config.excluded, config.seed)
                        yield await _compare(client, Bundle(folder), histories, part, progress)


@dataclass(frozen=True)
class _Part:
    """One row of the comparison."""

    prefix: Prefix
    k: int
    excluded: int
    seed: int


async def _compare(
    client: AsyncClient, bundle: Bundle, histories: Sequence[History], config: _Part, progress: Progress
) -> LosslessRow:
    catalogue, rule, k = bundle.catalogue(), bundle.manifest.scoring_rule, config.k
    template = bundle.manifest.target.prompt
    excluded = await _excluded(client, catalogue, template, histories, config, progress)
    replies = {}
    for mode in _MODES:
        requests = [
            RecommendRequest(
                history=history, k=k, beam_width=k, mode=mode, excluded=out, user_fields=user_fields(template, history)
            )
            for history, out in zip(histories, excluded, strict=True)
        ]
        if config.prefix is Prefix.REDIS and mode is Mode.STRICT:
            await asyncio.sleep(_WRITE_SECONDS)
        replies[mode] = await ask(
            client, requests, progress=progress, title=f"rule {rule}, {config.prefix}, K = {k}, {mode}"
        )
    alone, strict = replies[Mode.TARGET_ONLY], replies[Mode.STRICT]
    verdicts = [
        compare_bits(RankedList.of(a.items), RankedList.of(b.items)) for a, b in zip(strict, alone, strict=True)
    ]
    return LosslessRow(
        rule=str(rule),
        prefix=str(config.prefix),
        k=k,
        excluded=config.excluded,
        users=len(verdicts),
        **comparison_counts(verdicts),
        invalid_paths=sum(
            invalid_paths(reply, out, catalogue)
            for lists in replies.values()
            for reply, out in zip(lists, excluded, strict=True)
        ),
        cached_tokens_mean=mean([reply.statistics.cached_tokens.get(config.prefix, 0) for reply in strict]),
        target_only_passes_mean=mean([reply.statistics.target_passes for reply in alone]),
        strict_passes_mean=mean([reply.statistics.target_passes for reply in strict]),
        accepted_levels_mean=mean([reply.statistics.accepted_levels for reply in strict]),
    )


async def _excluded(
    client: AsyncClient,
    catalogue: Catalogue,
    template: PromptTemplate,
    histories: Sequence[History],
    config: _Part,
    progress: Progress,
) -> list[list[str]]:
    """Choose each user's excluded items, see the module's docstring."""
    if not config.excluded:
        return [[] for _ in histories]
    rng = np.random.default_rng(config.seed)
    width = max(config.k, config.excluded)
    requests = [
        RecommendRequest(history=history, k=width, mode=Mode.TARGET_ONLY, user_fields=user_fields(template, history))
        for history in histories
    ]
    replies = await ask(client, requests, progress=progress, title="choosing exclusions")
    return [_draw(rng, RankedList.of(reply.items).items, catalogue, config.excluded) for reply in replies]


def _draw(rng: np.random.Generator, recommended: Sequence[str], catalogue: Catalogue, count: int) -> list[str]:
    near = rng.permutation(len(recommended))[: count // 2]
    chosen = [recommended[index] for index in near]
    anywhere = (catalogue.id_of(int(item)) for item in rng.permutation(catalogue.items))
    taken = set(chosen)
    rest = [item for item in anywhere if item not in taken]
    return chosen + rest[: count - len(chosen)]


def invalid_paths(reply: Recommendation, excluded: Sequence[str], catalogue: Catalogue) -> int:
    """Count the items of a reply that are excluded, or that have another path in the catalogue."""
    index = catalogue.find([item.item_id for item in reply.items])
    banned, paths = set(excluded), catalogue.spelled_codes(index)
    return sum(
        position < 0 or item.item_id in banned or list(item.code_path) != path.tolist()
        for item, position, path in zip(reply.items, index.tolist(), paths, strict=True)
    )


@contextmanager
def _under_rule(root: Path, rule: ScoringRule) -> Iterator[Path]:
    """Yield the bundle, or a temporary copy of it whose manifest declares another rule."""
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
