"""Long histories: prompts read after the event, and what sparse prefill would save.

Lists come from the real services on an inflated target. A user's list is asked for in three states: nothing of the prompt is
cached; the target has read the prompt after the events; or one more event came, and the request before the target could read it.
Sparse prefill is measured apart (sample_attention.py, sparse_layer.py), since no service has it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from atspeed.benchmarks import markdown
from atspeed.benchmarks.markdown import origin, paragraphs, row_table
from atspeed.benchmarks.results import BenchmarkError, Columns, Result
from atspeed.benchmarks.services import ServiceOptions, Services, healthy_reply, started
from atspeed.engine.bundle.bundle import Bundle
from atspeed.training.decoder_graph import DecoderShape
from atspeed.training.inflated_bundles import Inflation, inflate_bundle
from atspeed.training.inflation import SHAPES
from atspeed.training.models import SpelledModel
from atspeed.training.pipeline import train
from atspeed.training.recipe import Recipe
from atspeed_client import AsyncClient, Recommendation, RecommendRequest
from research import sample_attention, sparse_layer
from research.recommenders import TrainedRun

NAME, SPARSE_LISTS, SPARSE_TIME, PREFILL = "long-histories", "sparse-lists", "sparse-time", "prefill"
TOKENS = (1024, 4096)  # of a prompt
SHARES = (0.95, 0.8, 0.5, 0.0)  # of attention that the kept keys of a sparse prefill hold; 0: the window alone
LEAST_TOKENS = (512, 1024)  # of the prompts of the users whose lists are compared
GATHERED = (0.65, 0.36, 0.12)  # of the keys, by a timed layer: what the shares 0.95, 0.8 and 0.5 kept in MovieLens
_K = 10
_SHAPE = "85m"
_PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.01
_BEGUN_SECONDS = 0.1  # after which a long prompt is being read
_MADE = ("atspeed_event_prefixes_total", "made")
_SHORT = 10  # items of the other user's history


@dataclass(frozen=True)
class LongConfig:
    """Configuration. rounds: users of each length. threads: of the services' target; the rest has one."""

    rounds: int = 3
    threads: int = 2
    seed: int = 1


@dataclass(frozen=True)
class ListRow:
    """Lists in one state, through the services.

    Attributes:
        ms: median time of a list.
        cpu_seconds: median processor time of the target, of the list alone.
        computed, cached: prompt tokens of the last list.
        identical: lists with the items and scores of the cold list of the same history.
        users: lists.
    """

    tokens: int
    state: str
    ms: float
    cpu_seconds: float
    computed: int
    cached: int
    identical: int
    users: int


COLUMNS: Columns[ListRow] = (
    ("prompt tokens", lambda row: f"{row.tokens:,}"),
    ("state", lambda row: row.state),
    ("list ms", lambda row: f"{row.ms:,.0f}"),
    ("target's processor s", lambda row: f"{row.cpu_seconds:.2f}"),
    ("tokens computed", lambda row: f"{row.computed:,}"),
    ("cached", lambda row: f"{row.cached:,}"),
    ("same list as cold", lambda row: f"{row.identical} of {row.users}"),
)

COLD, AHEAD, NEW_ITEM = "cold", "read after the event", "one item came since"
OTHER, OTHER_ALONE = "another user's short prompt, meanwhile", "another user's short prompt, alone"


def bundles(recipe: Recipe, run_folder: Path, data: Path | None) -> tuple[Path, Path]:
    """Train the target and inflate it; what is there already stays. Returns the run and the folder of the inflated one."""
    train(recipe, run_folder / "run", data, threads=1)
    inflated = run_folder / _SHAPE
    if not (inflated / "bundle").exists():
        inflations = {"target": Inflation(run_folder / "run" / "target-checkpoint", SHAPES[_SHAPE])}
        opened = Bundle(run_folder / "run" / "bundle")
        inflate_bundle(opened, inflated, inflations, label=_SHAPE, precision="float32", seed=1)  # type: ignore[arg-type]
    return run_folder / "run", inflated


def lists(bundle: Path, config: LongConfig) -> list[ListRow]:
    """Return the rows of lists through the services."""
    return asyncio.run(_lists(bundle, config))


def sparse_lists(run_folder: Path, data: Path | None, users: int, seed: int) -> list[sample_attention.SparseListsRow]:
    """Return the quality of lists after sparse prefills."""
    run = TrainedRun.open(run_folder, data)
    recommender = SpelledModel.load(run_folder / "target-checkpoint").recommender(run.recipe, run.catalogue)
    return sample_attention.run(recommender, run.eval_examples(users, seed), SHARES, LEAST_TOKENS, seed)


def times(
    run_folder: Path, inflated: Path, repeats: int
) -> tuple[list[sparse_layer.PrefillRow], list[sparse_layer.SparseTimeRow]]:
    """Return the processor time of prefills, and of sparse attention in them, for the trained and the inflated target."""
    models = {}
    for folder in (run_folder, inflated):
        bundle, checkpoint = Bundle(folder / "bundle"), SpelledModel.load(folder / "target-checkpoint")
        entry = bundle.model("target")
        models[f"{checkpoint.parameters / 1e6:.1f}M"] = (
            bundle.root / entry.path,
            entry,
            DecoderShape.of(checkpoint.model),
        )
    return sparse_layer.run(models, TOKENS, GATHERED, repeats)


async def _lists(bundle: Path, config: LongConfig) -> list[ListRow]:
    flags = {name: dict(settings) for name, settings in ServiceOptions(config.threads).flags.items()}
    flags["orchestrator"] |= {"prefix-on-event": True, "metrics-port": 0, "max-history-items": 2 * max(TOKENS)}
    flags["orchestrator"] |= {"request-timeout-seconds": _PATIENCE_SECONDS, "target-pass-seconds": _PATIENCE_SECONDS}
    flags["target"] |= {"kv-memory-mb": 2048, "kv-redis": "never"}
    opened = Bundle(bundle)
    ids = [opened.catalogue().id_of(item) for item in range(opened.catalogue().items)]
    per_item = opened.catalogue().trie.levels
    rows = []
    async with started(bundle, flags, timeout_seconds=_PATIENCE_SECONDS) as services:
        meter = _Meter(services, np.random.default_rng(config.seed), ids)
        await meter.short_list()  # warm
        for tokens in TOKENS:
            taken = [await meter.user(f"user-{tokens}-{number}", tokens // per_item) for number in range(config.rounds)]
            rows += [_row(tokens, state, [one for user in taken for one in user[state]]) for state in taken[0]]
    return rows


@dataclass(frozen=True)
class _Sample:
    """One list: its times, its prompt tokens, and whether it is the list that it should be."""

    seconds: float
    cpu_seconds: float
    computed: int
    cached: int
    identical: bool


class _Meter:
    """Asks the services for the lists of users with made histories."""

    def __init__(self, services: Services, rng: np.random.Generator, ids: Sequence[str]) -> None:
        self._services, self._rng, self._ids = services, rng, ids
        self._client: AsyncClient = services.client

    async def user(self, user: str, items: int) -> dict[str, list[_Sample]]:
        """Measure one user in every state."""
        *history, last = self._history(items + 1)
        cold, expected = await self._list(RecommendRequest(history=history, k=_K))
        made = self._prefixes()
        await self._client.record(user, history)
        await self._until(made + 1)
        ahead, _ = await self._list(RecommendRequest(user, k=_K), expected)
        _, longer = await self._list(RecommendRequest(history=[*history, last], k=_K))
        await self._client.record(user, [last])
        new_item, _ = await self._list(RecommendRequest(user, k=_K), longer)
        alone = [(await self.short_list())[0] for _ in range(3)]
        meanwhile = await self._meanwhile(self._history(items))
        return {COLD: [cold], AHEAD: [ahead], NEW_ITEM: [new_item], OTHER_ALONE: alone, OTHER: meanwhile}

    async def short_list(self) -> tuple[_Sample, Recommendation]:
        """Measure a list of a short history that nobody had."""
        return await self._list(RecommendRequest(history=self._history(_SHORT), k=_K))

    async def _meanwhile(self, history: Sequence[str]) -> list[_Sample]:
        """Measure short lists while the target reads a long prompt."""
        request = RecommendRequest(history=history, k=_K)
        reading = asyncio.create_task(healthy_reply(self._client, request))
        await asyncio.sleep(_BEGUN_SECONDS)
        samples = []
        while not reading.done():
            samples.append((await self.short_list())[0])
        await reading
        return samples[:-1] or samples  # the prompt was read before the last one ended

    async def _list(
        self, request: RecommendRequest, expected: Recommendation | None = None
    ) -> tuple[_Sample, Recommendation]:
        cpu, begun = self._cpu_seconds(), time.perf_counter()
        reply = await healthy_reply(self._client, request)
        seconds, cpu = time.perf_counter() - begun, self._cpu_seconds() - cpu
        cached, right = sum(reply.statistics.cached_tokens.values()), expected or reply
        same = [(one.item_id, one.score) for one in reply.items] == [(one.item_id, one.score) for one in right.items]
        return _Sample(seconds, cpu, reply.statistics.prompt_tokens - cached, cached, same), reply

    async def _until(self, made: float) -> None:
        until = time.monotonic() + _PATIENCE_SECONDS
        while self._prefixes() < made:
            if time.monotonic() > until:
                raise BenchmarkError("the target did not read the prompt after the event")
            await asyncio.sleep(_POLL_SECONDS)

    def _prefixes(self) -> float:
        """Return the number of prompts that were read after events."""
        port = self._services.local.orchestrators[0].metrics_port
        # urllib would ask a proxy of the environment.
        with closing(HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_SECONDS)) as connection:
            connection.request("GET", "/metrics")
            page = connection.getresponse().read().decode()
        samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
        return sum(sample.value for sample in samples if (sample.name, sample.labels.get("outcome")) == _MADE)

    def _cpu_seconds(self) -> float:
        """Return the processor time of the target's process."""
        process = self._services.local.targets[0].process
        if process is None:
            raise BenchmarkError("the target has ended")
        user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _history(self, items: int) -> list[str]:
        return [self._ids[place] for place in self._rng.choice(len(self._ids), items, replace=False).tolist()]


def _row(tokens: int, state: str, samples: Sequence[_Sample]) -> ListRow:
    return ListRow(
        tokens=tokens,
        state=state,
        ms=round(1e3 * median(one.seconds for one in samples), 1),
        cpu_seconds=round(median(one.cpu_seconds for one in samples), 3),
        computed=samples[-1].computed,
        cached=samples[-1].cached,
        identical=sum(one.identical for one in samples),
        users=len(samples),
    )


def header(config: LongConfig, data: str, note: str) -> dict[str, Any]:
    """Return the header's fields. data: its name. note: what readers should know of the run."""
    return {"benchmark": NAME, "question": asdict(config), "data": data, "note": note}


def write(result: Result, folder: Path) -> Path:
    """Write the page of a result. Returns its path."""
    return markdown.write(folder / "long-histories.md", _page(result))


def _page(result: Result) -> Iterator[str]:
    threads = result.header["question"]["threads"]
    yield from paragraphs(
        "# Long histories",
        f"Lists of {_K} items for prompts of {' and '.join(f'{count:,}' for count in TOKENS)} tokens, exact and sparse.\n"
        f"Items have four codes, so these are histories of {' and '.join(f'{count // 4:,}' for count in TOKENS)} items.",
        *([note] if (note := result.header["note"]) else []),
        "## Time of a list",
        f"Through the real services, one request at a time, target with {threads} threads, prefixes in memory.\n"
        "Histories are made: different items of the catalogue, in random order.\n"
        "*Read after the event*: the service has `prefix_on_event`, and the target was idle for as long as it read.\n"
        "*One item came since*: the request came with the event, and the target computed the new item in the list's first pass.\n"
        "*Another user's short prompt, meanwhile*: a history of ten items, asked for while the target reads the long prompt.\n"
        "Their processor time is that of both.",
    )
    yield from row_table(COLUMNS, result.rows_of(NAME, ListRow, kind=NAME))
    yield from paragraphs(
        "## Prefill in parts",
        "Processor time of a cold prompt, one thread, in one process.\n"
        "Served prompts are read in parts.\n"
        "A part has no later keys to mask, and the scores of all pairs are never in memory together.",
    )
    yield from row_table(sparse_layer.PREFILL_COLUMNS, result.rows_of(NAME, sparse_layer.PrefillRow, kind=PREFILL))
    yield from paragraphs(
        "## Sparse prefill: what it could save",
        "Processor time of the attention of all layers, one thread; the prefill is that in parts.\n"
        f"In sparse attention {sample_attention.SAMPLED:.0%} of a part's queries choose keys for each head.\n"
        f"A window of {sample_attention.WINDOW:.0%} is added.\n"
        "*Faster by*: the time of the whole prefill over that with other attention.\n"
        "Part of what sparse attention saves is that its sums have no order.\n"
        "Attention to all keys without ordered sums shows that part.",
    )
    yield from row_table(sparse_layer.TIME_COLUMNS, result.rows_of(NAME, sparse_layer.SparseTimeRow, kind=SPARSE_TIME))
    yield from paragraphs(
        "## Sparse prefill: its lists",
        f"Lists of the trained target for users of {result.header['data']} with long prompts, K = 20.\n"
        "Kept keys hold a share of the sampled attention (SampleAttention's alpha); 0 keeps the window alone.\n"
        "Beams attend to the whole prompt.\n"
        "Intervals of 95 % are over users.",
    )
    yield from row_table(
        sample_attention.COLUMNS, result.rows_of(NAME, sample_attention.SparseListsRow, kind=SPARSE_LISTS)
    )
    yield from origin(result.header, [("threads", str(threads))])
