"""Recall and NDCG of models, popularity and item-kNN, and a draft's agreement.

Protocol of the AtSpeed paper: the answer is the set of a user's items of the split, with 20 beams and nothing excluded.
With `exclude_seen`, models and baselines leave out the items of the history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

import numpy as np
import numpy.typing as npt
import scipy.sparse
from rich.table import Table
from transformers import PreTrainedModel

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.beams import BeamSearch, batches_of_equal_length, prompts_at_once
from atspeed.training.data import Case, Dataset, SplitName
from atspeed.training.recipe import RunSettings, Schedule
from atspeed.training.sequences import Batch, Sequencer
from atspeed.training.trainer import cross_entropy

Ranking = Sequence[int]  # item indices, best first
Scorer = Callable[["EvalExample"], npt.NDArray[np.float64]]  # a score for every item, [items]
CUTOFFS = (5, 10, 20)  # recall and NDCG are reported at these
BEAMS = 20  # the AtSpeed paper's beam width
_TIE_BREAK = 1000  # divides the share covered, so that it decides only between equal acceptance
_BATCH = 64  # sequences per pass of a loss; affects speed and memory only


@dataclass(frozen=True)
class EvalExample:
    """An evaluation case in item indices.

    Attributes:
        history: int64 [h], oldest first.
        targets: the answer, in time order.
    """

    history: Int64
    targets: tuple[int, ...]


def eval_examples(
    cases: Sequence[Case], catalogue: Catalogue, *, allow_empty: bool, limit: int, seed: int
) -> list[EvalExample]:
    """Return at most `limit` of the cases that have targets, drawn by the seed.

    Cases without a history are left out unless `allow_empty`.
    """
    answerable = [case for case in cases if case.targets and (case.history or allow_empty)]
    if len(answerable) > limit:
        chosen = np.sort(np.random.default_rng(seed).choice(len(answerable), size=limit, replace=False))
        answerable = [answerable[index] for index in chosen]
    return [
        EvalExample(catalogue.find(case.history), tuple(catalogue.find(case.targets).tolist())) for case in answerable
    ]


def metrics(rankings: Sequence[Ranking], examples: Sequence[EvalExample]) -> dict[str, float]:
    """Return mean recall@k and ndcg@k over the examples; empty without examples.

    recall@k = targets among the first k / targets. ndcg@k = DCG / DCG of a list that begins with the targets.
    """
    discount = 1 / np.log2(np.arange(2, max(CUTOFFS) + 2))
    sums = {f"{name}@{k}": 0.0 for name in ("recall", "ndcg") for k in CUTOFFS}
    for ranking, example in zip(rankings, examples, strict=True):
        # One entry per rank: 1 where a target stands.
        hits = np.zeros(max(CUTOFFS))
        hits[: len(ranking)] = [item in example.targets for item in ranking[: max(CUTOFFS)]]
        for k in CUTOFFS:
            sums[f"recall@{k}"] += hits[:k].sum() / len(example.targets)
            sums[f"ndcg@{k}"] += (hits[:k] @ discount[:k]) / discount[: min(k, len(example.targets))].sum()
    return {name: float(total / len(examples)) for name, total in sums.items() if examples}


@dataclass(frozen=True)
class SearchedLevel:
    """The beams of one level for many examples, best first.

    Attributes:
        node: int64 [examples, beams]. Trie nodes, -1 where there are fewer.
        score: float64 [examples, beams]. Cumulative log-probabilities.
    """

    node: Int64
    score: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, examples: int, beams: int) -> Self:
        """Return a level without beams."""
        return cls(np.full((examples, beams), -1, dtype=np.int64), np.full((examples, beams), -np.inf))


@dataclass(frozen=True)
class ModelRecommender:
    """A model that recommends items to evaluation examples.

    Attributes:
        model: the model.
        sequencer: builds its prompts.
        catalogue: the catalogue.
        rule: the scoring rule.
    """

    model: PreTrainedModel
    sequencer: Sequencer
    catalogue: Catalogue
    rule: ScoringRule

    def rank(self, examples: Sequence[EvalExample], *, exclude_seen: bool = False, beams: int = BEAMS) -> list[Ranking]:
        """Return the best items of each example, at most `beams`; items of one path in id order."""
        leaves = self.beams(examples, exclude_seen=exclude_seen, beams=beams)[-1]
        return [
            self._items(row, example if exclude_seen else None, beams)
            for row, example in zip(leaves, examples, strict=True)
        ]

    def beams(self, examples: Sequence[EvalExample], *, exclude_seen: bool = False, beams: int = BEAMS) -> list[Int64]:
        """Return the nodes of every level, best first: [examples, beams] per level, -1 where there are fewer."""
        return [level.node for level in self.search(examples, exclude_seen=exclude_seen, beams=beams)]

    def search(
        self, examples: Sequence[EvalExample], *, exclude_seen: bool = False, beams: int = BEAMS
    ) -> list[SearchedLevel]:
        """Return the beams of every level with their scores."""
        prompts = [self.sequencer.prompt(example.history) for example in examples]
        search = BeamSearch(self.model, self.sequencer.spelling, self.catalogue.trie, self.rule, beams)
        found = [SearchedLevel.empty(len(examples), beams) for _ in range(self.catalogue.trie.levels)]
        for group in batches_of_equal_length(prompts, prompts_at_once(self.sequencer.spelling.vocab_size, beams)):
            seen = (
                [self.catalogue.pruning(excluded=examples[index].history) for index in group] if exclude_seen else None
            )
            levels = search.levels(np.stack([prompts[index] for index in group]), seen)
            for level, step in zip(found, levels, strict=True):
                level.node[group, : step.node.shape[1]] = step.node.cpu().numpy()
                level.score[group, : step.node.shape[1]] = step.score.cpu().numpy()
        return found

    def _items(self, leaves: Int64, excluding: EvalExample | None, count: int) -> Ranking:
        seen = set(excluding.history.tolist()) if excluding else set()
        items = (item for leaf in leaves[leaves >= 0].tolist() for item in self.catalogue.items_of(leaf))
        return list(islice((item for item in items if item not in seen), count))


@dataclass(frozen=True)
class Validation:
    """The measures after each epoch: loss of the item that followed the prompt, and recall and NDCG at 10.

    Attributes:
        examples: the examples.
        batches: the examples as batches, for the loss.
        sequencer: builds the prompts.
        catalogue: the catalogue.
        rule: the scoring rule.
        by_loss: True if the loss chooses the best epoch, else recall@10.
    """

    examples: list[EvalExample]
    batches: list[Batch]
    sequencer: Sequencer
    catalogue: Catalogue
    rule: ScoringRule
    by_loss: bool

    @classmethod
    def of(
        cls, dataset: Dataset, catalogue: Catalogue, sequencer: Sequencer, settings: RunSettings, schedule: Schedule
    ) -> Validation:
        """Build it from the validation split, with at most `schedule.validation_users` users."""
        examples = eval_examples(
            dataset.cases("valid"),
            catalogue,
            allow_empty=settings.allow_empty_history,
            limit=schedule.validation_users,
            seed=settings.seed,
        )
        sequences = [sequencer.last_of(example.history, example.targets[0]) for example in examples]
        sequences.sort(key=lambda sequence: len(sequence.tokens))
        pad = sequencer.spelling.pad_token
        batches = [Batch.of(sequences[start : start + _BATCH], pad) for start in range(0, len(sequences), _BATCH)]
        return cls(examples, batches, sequencer, catalogue, settings.scoring_rule, schedule.select_by == "loss")

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Measure the model; empty without examples. The epoch with the largest `score` is the best."""
        if not self.examples:
            return {}
        losses = [self._loss(model, batch.to(model.device)) for batch in self.batches]
        sizes = [len(batch.tokens) for batch in self.batches]
        loss = float(np.average(losses, weights=sizes))
        found = metrics(
            ModelRecommender(model, self.sequencer, self.catalogue, self.rule).rank(self.examples), self.examples
        )
        score = -loss if self.by_loss else found["recall@10"]
        return {"loss": loss, "recall@10": found["recall@10"], "ndcg@10": found["ndcg@10"], "score": score}

    @staticmethod
    def _loss(model: PreTrainedModel, batch: Batch) -> float:
        return cross_entropy(model(input_ids=batch.tokens, use_cache=False).logits, batch).item()


@dataclass(frozen=True)
class AgreementValidation:
    """A validation that chooses the draft that covers the target's beams best.

    Attributes:
        validation: the measures of the draft's own lists.
        target: int64 [examples, K] per level. The target's beams.
        width: N, the number of the draft's beams.
    """

    validation: Validation
    target: Sequence[Int64]
    width: int

    @classmethod
    def of(cls, validation: Validation, target: ModelRecommender, *, beams: int, width: int) -> Self:
        """Compute the target's beams, once."""
        return cls(validation, target.beams(validation.examples, beams=beams), width)

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the validation's measures and the agreement. `score` is `accepted`; the share covered breaks ties.

        With a catalogue of one level nothing is planned, and the score is the validation's.
        """
        validation = self.validation
        if not validation.examples or validation.catalogue.trie.levels == 1:
            return validation(model)
        draft = ModelRecommender(model, validation.sequencer, validation.catalogue, validation.rule)
        found = agreement(self.target, draft.beams(validation.examples, beams=self.width))
        covered = float(np.mean([value for name, value in found.items() if name.endswith(".covered")]))
        measures = {"accepted": found["accepted"], "covered": covered}
        return validation(model) | measures | {"score": found["accepted"] + covered / _TIE_BREAK}


def popularity(dataset: Dataset, catalogue: Catalogue, *, before: SplitName = "valid") -> Scorer:
    """Score each item by its count in all histories before a split; `valid` leaves the train split."""
    counts = np.zeros(catalogue.items)
    for items in dataset.histories(before).values():
        np.add.at(counts, catalogue.find(items), 1)
    return lambda _: counts


def item_knn(dataset: Dataset, catalogue: Catalogue, *, recent: int, before: SplitName = "valid") -> Scorer:
    """Score by summed cosine similarity, of the sets of users, to the `recent` newest items (Sarwar et al. 2001).

    before: the split before which histories are counted. An example's own history is used in full.
    """
    users = [catalogue.find(items) for items in dataset.histories(before).values()]
    # A binary matrix of users x items, and its columns scaled to unit length.
    rows = np.repeat(np.arange(len(users)), [len(items) for items in users])
    shape = (len(users), catalogue.items)
    seen = scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, np.concatenate(users))), shape=shape)
    seen.data[:] = 1.0
    length = np.sqrt(np.asarray(seen.sum(axis=0)).ravel())
    cosine = seen.multiply(1 / np.maximum(length, 1)).tocsr()
    # Similarity of items x items; an item is not similar to itself.
    similarity = (cosine.T @ cosine).tocsr()
    similarity.setdiag(0)
    return lambda example: np.asarray(similarity[example.history[-recent:]].sum(axis=0)).ravel()


def rank_by(scorer: Scorer, examples: Sequence[EvalExample], *, exclude_seen: bool) -> list[Ranking]:
    """Return the scorer's best 20 items of each example, ties in the order of item indices."""
    rankings: list[Ranking] = []
    for example in examples:
        scores = scorer(example).astype(np.float64)
        if exclude_seen:
            scores = scores.copy()
            scores[example.history] = -np.inf
        best = np.argsort(-scores, kind="stable")[: max(CUTOFFS)]
        rankings.append(best.tolist())
    return rankings


def agreement(target: Sequence[Int64], draft: Sequence[Int64]) -> dict[str, float]:
    """Measure how well a draft's beams cover the target's.

    For each level but the last: the share of the target's beams that the draft has too, and the share of examples in which it
    has all. `accepted` is the mean number of leading levels that are covered completely, so target passes = L - accepted.
    Empty without examples.

    Args:
        target: int64 [examples, K] per level, -1 where there are fewer.
        draft: int64 [examples, N] per level, -1 where there are fewer.
    """
    if not len(target[0]):
        return {}
    result: dict[str, float] = {}
    ahead = np.ones(len(target[0]), dtype=bool)
    accepted = 0.0
    for level in range(len(target) - 1):
        # A target's beam is covered if the draft has the same node; missing beams (-1) count as covered.
        wanted = target[level]
        covered = (wanted[:, :, None] == draft[level][:, None, :]).any(-1) | (wanted < 0)
        # An example stays in `ahead` as long as every level so far is covered completely.
        ahead &= covered.all(axis=1)
        accepted += float(ahead.mean())
        result[f"level{level + 1}.covered"] = float(covered.mean())
        result[f"level{level + 1}.whole"] = float(covered.all(axis=1).mean())
    return result | {"accepted": accepted}


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Format measures as a table, one method per row."""
    names = list(next(iter(rows.values())))
    result = Table("", *names, title=title)
    for method, measured in rows.items():
        result.add_row(method, *(f"{measured[name]:.4f}" for name in names))
    return result
