"""What a number format costs and gives: lists beside float32's and their quality, time of a pass, and what company changes.

Lists are those of the run's own target, exported anew in each format, on users of the test split. Times are of another checkpoint
where one is given, as a larger one tells more; formats take turns pass by pass, so that what disturbs the machine disturbs all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np

from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.eval_examples import HeldOutCase, quality
from atspeed.benchmarks.intervals import Interval, bootstrap
from atspeed.benchmarks.results import Result
from atspeed.benchmarks.shared_tree_models import WarmTarget, prefix_cache, prompt_tokens, warm_evaluator
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Bundle, Precision
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.trie import Pruning
from atspeed.training.decoder_graph import DATA_FILE
from atspeed.training.export import MODEL_FILE, export_decoder
from atspeed.training.models import SpelledModel
from atspeed.training.parity import RandomTree, decoder_outputs, log_probabilities
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import Strict

NAME = "precision"
REFERENCE: Precision = "float32"
PRECISIONS: tuple[Precision, ...] = (REFERENCE, "float16", "int8")
TOKENS = (1, 5, 10, 20, 40, 80)
"""New tokens of the passes that are timed."""
CUTOFF = 10
"""Of recall, NDCG and the lists that are compared."""
_PASSES = 40
_TREES, _PROMPT, _NODES = 8, 48, 20


@dataclass(frozen=True)
class Question:
    """What is measured. k: beams. cached: tokens that a timed pass finds."""

    k: int = 20
    cached: int = 70
    threads: int = 1
    seed: int = 1


@dataclass(frozen=True)
class TrainedTarget:
    """A bundle, and the checkpoint that its target was exported from."""

    bundle: Bundle
    catalogue: Catalogue
    model: SpelledModel


@dataclass(frozen=True)
class Row:
    """One format. megabytes, pass_ms (by new tokens, median): of the timed model; all else of the run's.

    moved_by_company: the largest change of a log-probability between a node alone and the same among others. identical: lists
    of float32's items in float32's order, of the first ten; overlap: their common share. *_less: less float32's, by user.
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


def run(opened: TrainedTarget, timed: SpelledModel, cases: Sequence[HeldOutCase], question: Question) -> list[Row]:
    """A row for each format. timed: the model whose passes are timed."""
    with TemporaryDirectory(prefix="atspeed-precision-") as work:
        exports = [_Exported.of(opened.model, timed, Path(work), each, question) for each in PRECISIONS]
    times = _times([export.timed for export in exports], timed.spelling.vocab_size, question)
    lists = [asyncio.run(_lists(opened, export, cases, question.k)) for export in exports]
    expected = lists[PRECISIONS.index(REFERENCE)]
    vocab_size, seed = opened.model.spelling.vocab_size, question.seed
    moved = [_moved_by_company(export.target, vocab_size, seed) for export in exports]
    return [
        _row(export, pass_ms, changed, found, expected, cases, seed)
        for export, pass_ms, changed, found in zip(exports, times, moved, lists, strict=True)
    ]


def header(question: Question, *, timed: str) -> dict[str, Any]:
    """What the rows were asked for, beside where they come from. timed: what the timed model is."""
    return {"benchmark": NAME, "question": asdict(question), "timed": timed}


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, for a result file."""
    return [asdict(row) for row in rows]


def from_json(result: Result) -> list[Row]:
    """The rows of a result file. Raises BenchmarkError when it is another benchmark's."""
    if result.header.get("benchmark") != NAME:
        raise BenchmarkError(f"not a result of bench {NAME}")
    intervals = ("recall_less", "ndcg_less")
    return [Row(**{**row, **{name: Interval(**row[name]) for name in intervals}}) for row in result.rows]


@dataclass(frozen=True)
class _Exported:
    """Both models in one format."""

    precision: Precision
    target: Decoder
    timed: Decoder
    megabytes: float

    @classmethod
    def of(
        cls, target: SpelledModel, timed: SpelledModel, work: Path, precision: Precision, question: Question
    ) -> Self:
        options, folder = RuntimeOptions(intra_op_threads=question.threads), work / precision
        decoders = {}
        for name, model in (("target", target), ("timed", timed)):
            export_decoder(model.model, folder / name, code_tokens=model.spelling.code_tokens, precision=precision)
            decoders[name] = Decoder(folder / name / MODEL_FILE, options)
        return cls(precision, **decoders, megabytes=(folder / "timed" / DATA_FILE).stat().st_size / 1e6)


def _times(decoders: Sequence[Decoder], vocab_size: int, question: Question) -> list[dict[str, float]]:
    """Milliseconds of a pass by new tokens, the median, for each model."""
    random, took = np.random.default_rng(question.seed), [{str(new): list[float]() for new in TOKENS} for _ in decoders]
    for new in TOKENS:
        tokens = random.integers(0, vocab_size, new)
        positions, rows = np.full(new, question.cached), np.arange(new)
        visible = np.concatenate([np.ones((new, question.cached), dtype=bool), np.eye(new, dtype=bool)], axis=1)
        for _ in range(_PASSES):
            for decoder, samples in zip(decoders, took, strict=True):
                kv = decoder.empty_kv(question.cached + new)
                kv[:] = random.standard_normal(kv.shape[-1])
                begun = time.perf_counter_ns()
                decoder.run(tokens, positions, visible, kv[:, :, : question.cached], rows, kv[:, :, question.cached :])
                samples[str(new)].append((time.perf_counter_ns() - begun) / 1e6)
    return [{new: round(float(np.median(each)), 3) for new, each in samples.items()} for samples in took]


async def _lists(opened: TrainedTarget, export: _Exported, cases: Sequence[HeldOutCase], k: int) -> list[list[int]]:
    """Each user's K items as the target alone finds them."""
    catalogue, rule = opened.catalogue, opened.bundle.manifest.scoring_rule
    entry = opened.bundle.model("target").model_copy(update={"precision": export.precision})
    evaluator = warm_evaluator(export.target, entry, catalogue, rule, prefix_cache(entry))
    found = []
    for case in cases:
        target = WarmTarget(evaluator, prompt_tokens(catalogue, entry, case.history), Selection(Pruning.none(), k))
        leaves = (await beam_search(catalogue.trie, rule, Strict(k), target, NoDraft())).leaves
        items = (item for leaf in leaves.node.tolist() for item in catalogue.items_of(leaf))
        found.append(list(islice(items, k)))
    await evaluator.close()
    return found


def _moved_by_company(decoder: Decoder, vocab_size: int, seed: int) -> float:
    """The largest change over random trees behind random prompts."""
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
) -> Row:
    own, reference = (
        [quality(items, case.answers, CUTOFF) for items, case in zip(lists, cases, strict=True)]
        for lists in (found, expected)
    )
    pairs = list(zip(own, reference, strict=True))
    tops = [(ours[:CUTOFF], theirs[:CUTOFF]) for ours, theirs in zip(found, expected, strict=True)]
    return Row(
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
