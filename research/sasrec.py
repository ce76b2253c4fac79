"""SASRec of the library Cornac, trained on the train split of a data set.

Kang and McAuley 2018, arXiv 1808.09781.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.training.data import Dataset
from atspeed.training.evaluate import EvalExample, eval_examples

_Session = tuple[int, int, int]  # user, item, place in the session: the library's SIT format


def library() -> Any:
    """Import Cornac. Raises BenchmarkError if it is not installed."""
    try:
        importlib.import_module("cornac.models")
        return importlib.import_module("cornac")
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"{error.name} is not installed: pip install 'atspeed-serving[bench]'") from None


@dataclass(frozen=True)
class SasRecSettings:
    """Settings of the network and its training. All others are the library's defaults.

    Attributes:
        recent: items of a history that the network reads.
        negatives: items drawn for each batch by popularity ** 0.5, besides the batch's own targets, for the cross-entropy.
        epochs: epochs of training; the one that ranks validation users' next items best is kept.
    """

    dim: int = 64
    blocks: int = 2
    heads: int = 1
    recent: int = 20
    dropout: float = 0.4
    learning_rate: float = 3e-3
    batch_size: int = 512
    negatives: int = 2048
    epochs: int = 8
    validation_users: int = 1000
    validation_cutoff: int = 10


@dataclass(frozen=True)
class SasRec:
    """Trained model. items: the catalogue's index of each of its items, int64 [items of the train split]."""

    model: Any  # cornac.models.SASRec
    items: npt.NDArray[np.int64]
    catalogue_items: int

    @classmethod
    def train(cls, dataset: Dataset, catalogue: Catalogue, settings: SasRecSettings, *, seed: int) -> SasRec:
        """Train on the train split. The validation split only chooses the epoch; the test split is not read."""
        cornac = library()
        known: dict[int, int] = {}  # the library's numbers of items, in the order of their first occurrence
        histories = [catalogue.find(items).tolist() for items in dataset.train.values() if len(items) > 1]
        training = cornac.data.SequentialDataset.build(_sessions(histories), global_iid_map=known, seed=seed)
        asked = _sessions(_validation(dataset, catalogue, known, settings, seed))
        if not asked:
            raise BenchmarkError(
                f"sasrec: data set {dataset.name}: no user with validation items to choose its epoch by"
            )
        validation = cornac.data.SequentialDataset.build(asked, global_iid_map=known, seed=seed)
        model = cornac.models.SASRec(
            embedding_dim=settings.dim,
            num_blocks=settings.blocks,
            num_heads=settings.heads,
            max_len=settings.recent,
            dropout=settings.dropout,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            n_sample=settings.negatives,
            n_epochs=settings.epochs,
            model_selection="best",
            val_eval_every=1,
            val_k=settings.validation_cutoff,
            val_metric="ndcg",
            seed=seed,
        )
        model.fit(training, validation)
        return cls(model, np.fromiter(known, np.int64), catalogue.items)

    def score(self, question: EvalExample) -> npt.NDArray[np.float64]:
        """Return a score for every item of the catalogue, [items]; -inf for items that are not in the train split."""
        number = {item: index for index, item in enumerate(self.items.tolist())}
        history = [number[item] for item in question.history.tolist() if item in number]
        scores = np.full(self.catalogue_items, -np.inf)
        scores[self.items] = self.model.score(0, history)
        return scores


def _validation(
    dataset: Dataset, catalogue: Catalogue, known: Mapping[int, int], settings: SasRecSettings, seed: int
) -> Iterable[Sequence[int]]:
    """Yield histories that end with the first item of the validation split, if that is in the train split."""
    asked = eval_examples(
        dataset.cases("valid"), catalogue, allow_empty=False, limit=settings.validation_users, seed=seed
    )
    for question in asked:
        if question.targets[0] in known:
            yield [*question.history.tolist(), question.targets[0]]


def _sessions(histories: Iterable[Sequence[int]]) -> list[_Session]:
    return [(user, item, place) for user, items in enumerate(histories) for place, item in enumerate(items)]
