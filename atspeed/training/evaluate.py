"""Recall and NDCG of models by beam search through the trie, beside popularity and item-kNN; and a draft's agreement.

Protocol of the AtSpeed paper: the answer is the set of a user's items of the split, beams 20, nothing excluded.
`exclude_seen` leaves out what the history holds, in the models and the baselines alike.
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
from atspeed.training.beams import BeamSearch, batches_of_equal_length
from atspeed.training.data import Case, Dataset, SplitName
from atspeed.training.recipe import Recipe, Schedule
from atspeed.training.sequences import Batch, Sequencer
from atspeed.training.trainer import cross_entropy

Ranking = Sequence[int]  # item indices, best first
Scorer = Callable[["Question"], npt.NDArray[np.float64]]  # a score for every item, [items]
CUTOFFS = (5, 10, 20)
BEAMS = 20
_BATCH = 64


@dataclass(frozen=True)
class Question:
    """A case in item indices: history int64 [h], oldest first; targets in time order."""

    history: Int64
    targets: tuple[int, ...]


def questions(
    cases: Sequence[Case], catalogue: Catalogue, *, allow_empty: bool, limit: int, seed: int
) -> list[Question]:
    """At most `limit` of the cases that have targets, drawn by the seed; those without a history only where the model can answer
    them.
    """
    answerable = [case for case in cases if case.targets and (case.history or allow_empty)]
    if len(answerable) > limit:
        chosen = np.sort(np.random.default_rng(seed).choice(len(answerable), size=limit, replace=False))
        answerable = [answerable[index] for index in chosen]
    return [Question(catalogue.find(case.history), tuple(catalogue.find(case.targets).tolist())) for case in answerable]


def metrics(rankings: Sequence[Ranking], asked: Sequence[Question]) -> dict[str, float]:
    """Mean recall@k and ndcg@k over the questions; nothing where there are none.

    recall@k = found targets among the first k / targets. ndcg@k = DCG over that of a list that begins with the targets.
    """
    discount = 1 / np.log2(np.arange(2, max(CUTOFFS) + 2))
    sums = {f"{name}@{k}": 0.0 for name in ("recall", "ndcg") for k in CUTOFFS}
    for ranking, question in zip(rankings, asked, strict=True):
        hits = np.zeros(max(CUTOFFS))
        hits[: len(ranking)] = [item in question.targets for item in ranking[: max(CUTOFFS)]]
        for k in CUTOFFS:
            sums[f"recall@{k}"] += hits[:k].sum() / len(question.targets)
            sums[f"ndcg@{k}"] += (hits[:k] @ discount[:k]) / discount[: min(k, len(question.targets))].sum()
    return {name: float(total / len(asked)) for name, total in sums.items() if asked}


@dataclass(frozen=True)
class SearchedLevel:
    """The beams of one level, best first. node: int64 [questions, beams], -1 where there are fewer; score: float64 alike."""

    node: Int64
    score: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, questions: int, beams: int) -> Self:
        """No beams yet."""
        return cls(np.full((questions, beams), -1, dtype=np.int64), np.full((questions, beams), -np.inf))


@dataclass(frozen=True)
class Recommender:
    """A model with what it takes to ask it for items."""

    model: PreTrainedModel
    sequencer: Sequencer
    catalogue: Catalogue
    rule: ScoringRule

    def rank(self, asked: Sequence[Question], *, exclude_seen: bool = False, beams: int = BEAMS) -> list[Ranking]:
        """The best items of each question, at most `beams`; items of one path in id order."""
        leaves = self.beams(asked, exclude_seen=exclude_seen, beams=beams)[-1]
        return [
            self._items(row, question if exclude_seen else None, beams)
            for row, question in zip(leaves, asked, strict=True)
        ]

    def beams(self, asked: Sequence[Question], *, exclude_seen: bool = False, beams: int = BEAMS) -> list[Int64]:
        """The beams of every level, best first: trie nodes [questions, beams] per level, -1 where there are fewer."""
        return [level.node for level in self.search(asked, exclude_seen=exclude_seen, beams=beams)]

    def search(
        self, asked: Sequence[Question], *, exclude_seen: bool = False, beams: int = BEAMS
    ) -> list[SearchedLevel]:
        """The beams of every level with their scores."""
        prompts = [self.sequencer.prompt(question.history) for question in asked]
        search = BeamSearch(self.model, self.sequencer.spelling, self.catalogue.trie, self.rule, beams)
        found = [SearchedLevel.empty(len(asked), beams) for _ in range(self.catalogue.trie.levels)]
        for group in batches_of_equal_length(prompts, _BATCH):
            seen = [self.catalogue.pruning(excluded=asked[index].history) for index in group] if exclude_seen else None
            levels = search.levels(np.stack([prompts[index] for index in group]), seen)
            for level, step in zip(found, levels, strict=True):
                level.node[group, : step.node.shape[1]] = step.node.cpu().numpy()
                level.score[group, : step.node.shape[1]] = step.score.cpu().numpy()
        return found

    def _items(self, leaves: Int64, excluding: Question | None, count: int) -> Ranking:
        seen = set(excluding.history.tolist()) if excluding else set()
        items = (item for leaf in leaves[leaves >= 0].tolist() for item in self.catalogue.items_of(leaf))
        return list(islice((item for item in items if item not in seen), count))


@dataclass(frozen=True)
class Validation:
    """What the trainer measures after each epoch: loss of the next item after the prompt, recall and ndcg at 10."""

    asked: list[Question]
    batches: list[Batch]
    sequencer: Sequencer
    catalogue: Catalogue
    rule: ScoringRule
    by_loss: bool

    @classmethod
    def of(
        cls, dataset: Dataset, catalogue: Catalogue, sequencer: Sequencer, recipe: Recipe, schedule: Schedule
    ) -> Validation:
        """From the validation split, at most `schedule.validation_users` of it."""
        asked = questions(
            dataset.cases("valid"),
            catalogue,
            allow_empty=recipe.allow_empty_history,
            limit=schedule.validation_users,
            seed=recipe.seed,
        )
        examples = [sequencer.last_of(question.history, question.targets[0]) for question in asked]
        examples.sort(key=lambda example: len(example.tokens))
        pad = sequencer.spelling.pad_token
        batches = [Batch.of(examples[start : start + _BATCH], pad) for start in range(0, len(examples), _BATCH)]
        return cls(asked, batches, sequencer, catalogue, recipe.scoring_rule, schedule.select_by == "loss")

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Measures of the model, none where nobody is asked; `score` is what the best epoch is chosen by, larger is better."""
        if not self.asked:
            return {}
        losses = [self._loss(model, batch.to(model.device)) for batch in self.batches]
        sizes = [len(batch.tokens) for batch in self.batches]
        loss = float(np.average(losses, weights=sizes))
        found = metrics(Recommender(model, self.sequencer, self.catalogue, self.rule).rank(self.asked), self.asked)
        score = -loss if self.by_loss else found["recall@10"]
        return {"loss": loss, "recall@10": found["recall@10"], "ndcg@10": found["ndcg@10"], "score": score}

    @staticmethod
    def _loss(model: PreTrainedModel, batch: Batch) -> float:
        return cross_entropy(model(input_ids=batch.tokens, use_cache=False).logits, batch).item()


@dataclass(frozen=True)
class AgreementValidation:
    """A validation that chooses the draft that covers the target's beams best, whatever it recommends itself.

    target: the target's beams on the validation's questions, per level, nodes [questions, K]. width: N, the draft's.
    """

    validation: Validation
    target: Sequence[Int64]
    width: int

    @classmethod
    def of(cls, validation: Validation, target: Recommender, *, beams: int, width: int) -> Self:
        """Ask the target, once."""
        return cls(validation, target.beams(validation.asked, beams=beams), width)

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """The validation's measures and the agreement; `score` is `accepted`, ties go to the larger share covered.

        Over a catalogue of one level nothing is planned: the score is the validation's.
        """
        asking = self.validation
        if not asking.asked or asking.catalogue.trie.levels == 1:
            return asking(model)
        draft = Recommender(model, asking.sequencer, asking.catalogue, asking.rule)
        found = agreement(self.target, draft.beams(asking.asked, beams=self.width))
        covered = float(np.mean([value for name, value in found.items() if name.endswith(".covered")]))
        measures = {"accepted": found["accepted"], "covered": covered}
        return asking(model) | measures | {"score": found["accepted"] + covered / 1000}


def popularity(dataset: Dataset, catalogue: Catalogue, *, before: SplitName = "valid") -> Scorer:
    """Each item's count in all histories before a split; before validation there is what models are trained on."""
    counts = np.zeros(catalogue.items)
    for items in dataset.histories(before).values():
        np.add.at(counts, catalogue.find(items), 1)
    return lambda _: counts


def item_knn(dataset: Dataset, catalogue: Catalogue, *, recent: int, before: SplitName = "valid") -> Scorer:
    """Summed cosine similarity, of the sets of users, to the `recent` newest items (Sarwar et al. 2001).

    before: the split before which all histories are counted. A question's own history is whatever it is.
    """
    users = [catalogue.find(items) for items in dataset.histories(before).values()]
    rows = np.repeat(np.arange(len(users)), [len(items) for items in users])
    shape = (len(users), catalogue.items)
    seen = scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, np.concatenate(users))), shape=shape)
    seen.data[:] = 1.0
    length = np.sqrt(np.asarray(seen.sum(axis=0)).ravel())
    cosine = seen.multiply(1 / np.maximum(length, 1)).tocsr()
    similarity = (cosine.T @ cosine).tocsr()
    similarity.setdiag(0)
    return lambda question: np.asarray(similarity[question.history[-recent:]].sum(axis=0)).ravel()


def rank_by(scorer: Scorer, asked: Sequence[Question], *, exclude_seen: bool) -> list[Ranking]:
    """The best 20 items of each question by a scorer; ties in the order of item indices."""
    rankings: list[Ranking] = []
    for question in asked:
        scores = scorer(question).astype(np.float64)
        if exclude_seen:
            scores = scores.copy()
            scores[question.history] = -np.inf
        best = np.argsort(-scores, kind="stable")[: max(CUTOFFS)]
        rankings.append(best.tolist())
    return rankings


def agreement(target: Sequence[Int64], draft: Sequence[Int64]) -> dict[str, float]:
    """How well a draft's beams cover the target's: what speculation lives on.

    target: per level, nodes [questions, K]; draft: [questions, N]; -1 where there are fewer. For each level but the
    last: the share of the target's beams that the draft has too, and how often it has them all; `accepted` = mean
    number of leading levels that are covered whole, so target passes = L - accepted. Nothing where there are no questions.
    """
    if not len(target[0]):
        return {}
    result: dict[str, float] = {}
    ahead = np.ones(len(target[0]), dtype=bool)
    accepted = 0.0
    for level in range(len(target) - 1):
        wanted = target[level]
        covered = (wanted[:, :, None] == draft[level][:, None, :]).any(-1) | (wanted < 0)
        ahead &= covered.all(axis=1)
        accepted += float(ahead.mean())
        result[f"level{level + 1}.covered"] = float(covered.mean())
        result[f"level{level + 1}.whole"] = float(covered.all(axis=1).mean())
    return result | {"accepted": accepted}


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Measures for people, one method per row."""
    names = list(next(iter(rows.values())))
    result = Table("", *names, title=title)
    for method, measured in rows.items():
        result.add_row(method, *(f"{measured[name]:.4f}" for name in names))
    return result
