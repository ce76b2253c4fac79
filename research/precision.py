"""Cost and quality of number formats: time, lists, Recall and NDCG.

Lists are those of the run's own target, exported anew in each format, for users of the test split. Times are those of another
checkpoint where one is given, because a larger one shows more. Formats take turns pass by pass, so that a disturbance of the
machine meets all of them. The change of a log-probability by co-batched nodes is measured too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np

from atspeed.benchmarks import markdown
from atspeed.benchmarks.histories import prompt_tokens
from atspeed.benchmarks.intervals import Interval, bootstrap
from atspeed.benchmarks.markdown import paragraphs, row_table
from atspeed.benchmarks.results import Columns, Result
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.trie import Pruning
from atspeed.training.export import MODEL_FILE, export_decoder
from atspeed.training.graph_builder import DATA_FILE
from atspeed.training.models import SpelledModel
from atspeed.training.parity import RandomTree, decoder_outputs, log_probabilities
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import Strict
from research.eval_examples import HeldOutCase, quality
from research.shared_tree_models import SharedTreeTarget, prefix_cache, shared_evaluator

NAME = "precision"
REFERENCE: Precision = "float32"
PRECISIONS: tuple[Precision, ...] = (REFERENCE, "float16", "int8")
TOKENS = (1, 5, 10, 20, 40, 80)
"""New tokens of the timed passes."""
CUTOFF = 10
"""Cutoff of Recall, NDCG and the compared lists."""
_PASSES = 40  # of which the median counts
_TREES, _PROMPT, _NODES = 8, 48, 20  # random trees of which the largest change counts


@dataclass(frozen=True)
class PrecisionConfig:
    """Configuration of the measurement. k: beams. cached: cached tokens of a timed pass."""

    k: int = 20
    cached: int = 70
    threads: int = 1
    seed: int = 1


@dataclass(frozen=True)
class TrainedTarget:
    """Bundle and the checkpoint that its target was exported from."""

    bundle: Bundle
    catalogue: Catalogue
    model: SpelledModel


@dataclass(frozen=True)
class PrecisionRow:
    """One number format. megabytes and pass_ms are those of the timed model, all others of the run's.

    Attributes:
        pass_ms: median by new tokens.
        moved_by_company: the largest change of a log-probability between a node alone and the same node among others.
        identical: users whose first ten items are float32's in float32's order.
        overlap: share of the first ten items that are float32's.
        recall_less, ndcg_less: Recall and NDCG less float32's, by user.
    """

    precision: Precision
    users: int
    megabytes: float
    pass_ms: Mapping[str, float]
    moved_by_company: float
    identical: int
    overlap: float
    recall: float
    ndcg: float
    recall_less: Interval
    ndcg_less: Interval


def run(
    opened: TrainedTarget, timed: SpelledModel, cases: Sequence[HeldOutCase], config: PrecisionConfig
) -> list[PrecisionRow]:
    """Return a row for each format. timed: the model whose passes are timed."""
    with TemporaryDirectory(prefix="atspeed-precision-") as work:
        exports = [_Exported.of(opened.model, timed, Path(work), each, config) for each in PRECISIONS]
    times = _times([export.timed for export in exports], timed.spelling.vocab_size, config)
    lists = [asyncio.run(_lists(opened, export, cases, config.k)) for export in exports]
    expected = lists[PRECISIONS.index(REFERENCE)]
    vocab_size, seed = opened.model.spelling.vocab_size, config.seed
    moved = [_moved_by_company(export.target, vocab_size, seed) for export in exports]
    return [
        _row(export, pass_ms, changed, found, expected, cases, seed)
        for export, pass_ms, changed, found in zip(exports, times, moved, lists, strict=True)
    ]


def header(config: PrecisionConfig, *, timed: str) -> dict[str, Any]:
    """Return the header's fields. timed: a description of the timed model."""
    return {"benchmark": NAME, "question": asdict(config), "timed": timed}


@dataclass(frozen=True)
class _Exported:
    """Both models in one number format."""

    precision: Precision
    target: Decoder
    timed: Decoder
    megabytes: float

    @classmethod
    def of(
        cls, target: SpelledModel, timed: SpelledModel, work: Path, precision: Precision, config: PrecisionConfig
    ) -> Self:
        options, folder = RuntimeOptions(intra_op_threads=config.threads), work / precision
        decoders = {}
        for name, model in (("target", target), ("timed", timed)):
            export_decoder(model.model, folder / name, code_tokens=model.spelling.code_tokens, precision=precision)
            decoders[name] = Decoder(folder / name / MODEL_FILE, options)
        return cls(precision, **decoders, megabytes=(folder / "timed" / DATA_FILE).stat().st_size / 1e6)


def _times(decoders: Sequence[Decoder], vocab_size: int, config: PrecisionConfig) -> list[dict[str, float]]:
    """Return the median milliseconds of a pass by new tokens, for each model."""
    random, took = np.random.default_rng(config.seed), [{str(new): list[float]() for new in TOKENS} for _ in decoders]
    for new in TOKENS:
        tokens = random.integers(0, vocab_size, new)
        positions, rows = np.full(new, config.cached), np.arange(new)
        visible = np.concatenate([np.ones((new, config.cached), dtype=bool), np.eye(new, dtype=bool)], axis=1)
        for _ in range(_PASSES):
            for decoder, samples in zip(decoders, took, strict=True):
                kv = decoder.empty_kv(config.cached + new)
                kv[:] = random.standard_normal(kv.shape[-1])
                begun = time.perf_counter_ns()
                decoder.run(tokens, positions, visible, kv[:, :, : config.cached], rows, kv[:, :, config.cached :])
                samples[str(new)].append((time.perf_counter_ns() - begun) / 1e6)
    return [{new: round(float(np.median(each)), 3) for new, each in samples.items()} for samples in took]


async def _lists(opened: TrainedTarget, export: _Exported, cases: Sequence[HeldOutCase], k: int) -> list[list[int]]:
    """Return each user's K items by the target alone."""
    catalogue, rule = opened.catalogue, opened.bundle.manifest.scoring_rule
    entry = opened.bundle.model("target").model_copy(update={"precision": export.precision})
    evaluator = shared_evaluator(export.target, entry, catalogue, rule, prefix_cache(entry))
    found = []
    for case in cases:
        target = SharedTreeTarget(
            evaluator, prompt_tokens(catalogue, entry, case.history), Selection(Pruning.none(), k)
        )
        leaves = (await beam_search(catalogue.trie, rule, Strict(BeamWidths.of(k)), target, NoDraft())).leaves
        items = (item for leaf in leaves.node.tolist() for item in catalogue.items_of(leaf))
        found.append(list(islice(items, k)))
    await evaluator.close()
    return found


def _moved_by_company(decoder: Decoder, vocab_size: int, seed: int) -> float:
    """Return the largest change over random trees behind random prompts."""
    moved = 0.0
    for number in range(_TREES):
        random = np.random.default_rng((seed, number))
        tree = RandomTree.grow(random, vocab_size, prefix=_PROMPT, nodes=_NODES)
        together = log_probabilities(decoder_outputs(decoder, tree))
        for node in range(tree.prefix, len(tree.tokens)):
            alone = log_probabilities(decoder_outputs(decoder, tree.alone(node)))[-1]
            change = alone - together[node - tree.prefix + 1]
            moved = max(moved, float(np.abs(change).max()))
    return moved


def _row(
    export: _Exported,
    pass_ms: Mapping[str, float],
    moved: float,
    found: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    cases: Sequence[HeldOutCase],
    seed: int,
) -> PrecisionRow:
    own, reference = (
        [quality(items, case.answers, CUTOFF) for items, case in zip(lists, cases, strict=True)]
        for lists in (found, expected)
    )
    pairs = list(zip(own, reference, strict=True))
    tops = [(ours[:CUTOFF], theirs[:CUTOFF]) for ours, theirs in zip(found, expected, strict=True)]
    return PrecisionRow(
        precision=export.precision,
        users=len(cases),
        megabytes=round(export.megabytes, 1),
        pass_ms=pass_ms,
        moved_by_company=moved,
        identical=sum(ours == theirs for ours, theirs in tops),
        overlap=round(float(np.mean([len({*ours} & {*theirs}) / len(theirs) for ours, theirs in tops])), 4),
        recall=float(np.mean([each.recall for each in own])),
        ndcg=float(np.mean([each.ndcg for each in own])),
        recall_less=bootstrap([ours.recall - theirs.recall for ours, theirs in pairs], seed=seed),
        ndcg_less=bootstrap([ours.ndcg - theirs.ndcg for ours, theirs in pairs], seed=seed),
    )


def _identical(row: PrecisionRow) -> str:
    return f"{row.identical} of {row.users}"


def _less(row: PrecisionRow, interval: Interval) -> str:
    if row.precision == REFERENCE:
        return ""
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


QUALITY_COLUMNS: Columns[PrecisionRow] = (
    ("", lambda row: row.precision),
    ("identical", _identical),
    ("in common", lambda row: f"{row.overlap:.1%}"),
    ("Recall", lambda row: f"{row.recall:.4f}"),
    ("less", lambda row: _less(row, row.recall_less)),
    ("NDCG", lambda row: f"{row.ndcg:.4f}"),
    ("less", lambda row: _less(row, row.ndcg_less)),
)
TERMINAL_COLUMNS: Columns[PrecisionRow] = (
    ("", lambda row: row.precision),
    *((f"{new} new", lambda row, new=new: f"{row.pass_ms[str(new)]:.2f}") for new in TOKENS),
    ("moved", lambda row: f"{row.moved_by_company:.1g}"),
    ("same", _identical),
    (f"Recall@{CUTOFF}", lambda row: f"{row.recall:.4f}"),
)


def write(result: Result, folder: Path) -> Path:
    """Write the page of a result file. Returns its path."""
    return markdown.write(folder / "precision.md", _page(result.header, result.rows_of(NAME, PrecisionRow)))


def _page(header: Mapping[str, Any], rows: Sequence[PrecisionRow]) -> Iterator[str]:
    asked = header["question"]
    yield from paragraphs(
        "# Cost and benefit of a number format",
        f"The bundle's target, exported anew in each format: lists of {rows[0].users} users of the test split, K = {asked['k']}, "
        f"by the target alone. Passes, with {asked['cached']} cached tokens and every new token's logits wanted, are timed of "
        f"{header['timed']}; formats take turns.",
    )
    yield from markdown.origin(header, [("threads", str(asked["threads"]))])
    yield from paragraphs("## A pass", "Median in ms by new tokens; float32's over it. Size of the weights' file.")
    reference = next(row for row in rows if row.precision == REFERENCE)
    yield from markdown.table(
        ("", *map(str, TOKENS), "MB"),
        [(row.precision, *(_time(row, reference, str(new)) for new in TOKENS), f"{row.megabytes:.1f}") for row in rows],
    )
    yield from paragraphs(
        "## Effect of co-batched requests",
        "Largest change of a log-probability between a node alone behind its prompt and the same node among 19 others.",
    )
    yield from markdown.table(("", "moved by"), [(row.precision, f"{row.moved_by_company:.1e}") for row in rows])
    yield from paragraphs(
        "## Lists",
        f"The first {CUTOFF} items beside float32's: the same in the same order, and the share in common. Recall and NDCG at "
        f"{CUTOFF}; less float32's for the same users, with 95 % bootstrap intervals.",
    )
    yield from row_table(QUALITY_COLUMNS, rows)


def _time(row: PrecisionRow, reference: PrecisionRow, new: str) -> str:
    times = f", **{reference.pass_ms[new] / row.pass_ms[new]:.2f}x**" if row is not reference else ""
    return f"{row.pass_ms[new]:.2f}{times}"
