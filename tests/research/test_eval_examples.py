"""Held-out cases, quality of lists, and intervals of means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from atspeed.benchmarks.intervals import bootstrap, half_width
from atspeed.benchmarks.results import BenchmarkError
from atspeed.training import evaluate
from atspeed.training.data import CatalogueItem, Dataset, read_atspeed
from research.eval_examples import choose_cases, quality
from tests.catalogues import random_catalogue
from tests.datasets import write_dataset

CATALOGUE = random_catalogue(80, (6, 5, 4, 4), seed=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), CATALOGUE)


def test_cases_and_quality_equal_those_of_training(data: Path) -> None:
    """A seed gives the same users, and rankings have the same Recall and NDCG, as in the training."""
    dataset = read_atspeed(data)
    mine = choose_cases(dataset, CATALOGUE, allow_empty=False, users=7, seed=2)
    asked = evaluate.eval_examples(dataset.cases("test"), CATALOGUE, allow_empty=False, limit=7, seed=2)
    assert [(case.history, case.answers) for case in mine] == [
        (tuple(question.history.tolist()), question.targets) for question in asked
    ]
    assert len({case.seed for case in mine}) == 7
    rng = np.random.default_rng(1)
    rankings = [[*rng.permutation(12)[:size].tolist(), *mine[size].answers][:20] for size in range(7)]
    wanted = evaluate.metrics(rankings, asked)
    for cutoff in (5, 10, 20):
        found = [quality(ranking, case.answers, cutoff) for ranking, case in zip(rankings, mine, strict=True)]
        assert np.mean([each.recall for each in found]) == pytest.approx(wanted[f"recall@{cutoff}"])
        assert np.mean([each.ndcg for each in found]) == pytest.approx(wanted[f"ndcg@{cutoff}"])


def test_unusable_cases_are_refused() -> None:
    """No test items; an item that the bundle does not know; an empty history only where the model can answer it."""
    known = CATALOGUE.id_of(0)
    items = (CatalogueItem(known), CatalogueItem("new"))
    nobody = Dataset("d", "", items, {"u": (known,)}, {}, {})
    stranger = Dataset("d", "", items, {"u": (known,)}, {}, {"u": ("new",)})
    fresh = Dataset("d", "", items, {}, {}, {"u": (known,)})
    for dataset, problem in ((nobody, "no user"), (stranger, "'new'"), (fresh, "no user")):
        with pytest.raises(BenchmarkError, match=problem):
            choose_cases(dataset, CATALOGUE, allow_empty=False, users=3, seed=1)
    assert choose_cases(fresh, CATALOGUE, allow_empty=True, users=3, seed=1)[0].history == ()


def test_intervals_equal_scipy() -> None:
    """Intervals equal their definition, and SciPy's bootstrap."""
    values = np.random.default_rng(0).normal(size=400)
    assert half_width(list(values)) == pytest.approx(1.96 * values.std(ddof=1) / 20)
    assert half_width([3.0]) == 0
    found = bootstrap(list(values), seed=1)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=1).confidence_interval
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), theirs.low, theirs.high))
    assert (found.high - found.low) / 2 == pytest.approx(half_width(list(values)), rel=0.1)
