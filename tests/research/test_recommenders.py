"""`research recommenders`: equal to the run's own evaluation; and SASRec."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from atspeed.benchmarks.results import BenchmarkError, Result, to_json
from atspeed.training import evaluate
from atspeed.training.data import Dataset
from atspeed.training.evaluate import EvalExample
from atspeed.training.pipeline import train
from research import recommenders
from research.__main__ import app
from research.recommenders import CUTOFFS, Method, RecommenderRow, TrainedRun
from research.sasrec import SasRec, SasRecSettings
from tests.recipes import TINY, with_epochs

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SEED = 3
SMALL = SasRecSettings(dim=16, blocks=1, batch_size=64, negatives=32, learning_rate=1e-2, epochs=8, validation_users=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of runs/tiny.toml with one epoch for each model."""
    assert TINY.draft is not None
    models = {"target": with_epochs(TINY.target, 1), "draft": with_epochs(TINY.draft, 1)}
    path = tmp_path_factory.mktemp("run")
    train(TINY.model_copy(update=models), path, threads=1)
    return path


@pytest.fixture(scope="module")
def opened(folder: Path) -> TrainedRun:
    return TrainedRun.open(folder, None)


@pytest.fixture(scope="module")
def asked(opened: TrainedRun) -> list[EvalExample]:
    return opened.eval_examples(None, SEED)


@pytest.fixture(scope="module")
def rows(opened: TrainedRun, asked: list[EvalExample]) -> list[RecommenderRow]:
    return recommenders.run(asked, list(recommenders.own_methods(opened)), seed=SEED)


@pytest.fixture(scope="module")
def sasrec(opened: TrainedRun) -> SasRec:
    pytest.importorskip("cornac")
    return SasRec.train(opened.dataset, opened.catalogue, SMALL, seed=SEED)


def test_means_equal_the_runs_own_evaluation(folder: Path, rows: list[RecommenderRow]) -> None:
    """All users are measured, with and without seen items, as by the run."""
    report = json.loads((folder / "metrics.json").read_text())
    assert {(row.table, row.method) for row in rows} == {
        (table, method)
        for table in ("all", "unseen")
        for method in ("target", "draft", "popularity", "item-knn", "item-knn-refitted")
    }
    for row in rows:
        wanted = report["test" if row.table == "all" else "test-unseen"][row.method]
        for cutoff in CUTOFFS:
            assert row.recall[str(cutoff)].mean == pytest.approx(wanted[f"recall@{cutoff}"])
            assert row.ndcg[str(cutoff)].mean == pytest.approx(wanted[f"ndcg@{cutoff}"])


def test_intervals_are_near_normal_and_paired(rows: list[RecommenderRow], asked: list[EvalExample]) -> None:
    """Half widths are near the normal law's; the difference from item-kNN is paired: of its own ranking it is 0."""
    for row in rows:
        mean, ci95 = row.recall["10"].mean, row.recall["10"].ci95
        assert ci95 == pytest.approx(1.96 * np.sqrt(mean * (1 - mean) / row.users), rel=0.15)  # one target per user
        assert (row.recall_less_item_knn is None) == (row.method == "item-knn")
        if row.recall_less_item_knn is not None:
            (reference,) = [other for other in rows if (other.table, other.method) == (row.table, "item-knn")]
            found = row.recall_less_item_knn
            assert found.value == pytest.approx(mean - reference.recall["10"].mean)
            assert found.low <= found.value <= found.high
    knn = Method("item-knn", lambda questions, _: [[1, 2, 3] for _ in questions])
    for row in recommenders.run(asked, [knn, replace(knn, name="twin")], seed=SEED):
        if (nothing := row.recall_less_item_knn) is not None:
            assert (nothing.low, nothing.value, nothing.high) == (0, 0, 0)


def test_sasrec_beats_popularity_and_is_reproducible(
    opened: TrainedRun, asked: list[EvalExample], sasrec: SasRec
) -> None:
    """Better than popularity on walks along fixed successors, and the same again by the same seed."""
    rankings = evaluate.rank_by(sasrec.score, asked, exclude_seen=False)
    popular = evaluate.rank_by(evaluate.popularity(opened.dataset, opened.catalogue), asked, exclude_seen=False)
    assert evaluate.metrics(rankings, asked)["recall@10"] > 1.5 * evaluate.metrics(popular, asked)["recall@10"]
    again = SasRec.train(opened.dataset, opened.catalogue, SMALL, seed=SEED)
    assert np.array_equal(again.score(asked[0]), sasrec.score(asked[0]))


def test_sasrec_without_a_validation_split_is_refused(opened: TrainedRun) -> None:
    pytest.importorskip("cornac")
    dataset = opened.dataset
    blind = Dataset("blind", dataset.terms, dataset.items, dataset.train, {}, dataset.test)
    with pytest.raises(BenchmarkError, match="sasrec: data set blind: no user with validation items"):
        SasRec.train(blind, opened.catalogue, SMALL, seed=SEED)


def test_sasrec_ignores_the_test_split(opened: TrainedRun, asked: list[EvalExample], sasrec: SasRec) -> None:
    dataset = opened.dataset
    blind = Dataset(dataset.name, dataset.terms, dataset.items, dataset.train, dataset.valid, {})
    found = SasRec.train(blind, opened.catalogue, SMALL, seed=SEED)
    assert np.array_equal(found.score(asked[0]), sasrec.score(asked[0]))


def test_sasrec_gives_no_score_to_unseen_items(opened: TrainedRun) -> None:
    """They would keep the score of a random start. Of an empty history, and of one that only holds them, all others are alike."""
    pytest.importorskip("cornac")
    dataset, catalogue = opened.dataset, opened.catalogue
    new = dataset.items[0].id
    train_split = {user: tuple(item for item in items if item != new) for user, items in dataset.train.items()}
    model = SasRec.train(
        Dataset("without", "", dataset.items, train_split, dataset.valid, dataset.test),
        catalogue,
        replace(SMALL, epochs=1),
        seed=SEED,
    )
    index = int(catalogue.find([new])[0])
    for history in ([], [index]):
        scores = model.score(EvalExample(np.array(history, dtype=np.int64), (0,)))
        assert np.flatnonzero(~np.isfinite(scores)).tolist() == [index]
        assert len(set(scores[np.isfinite(scores)].tolist())) == 1


# --- the command line


def test_command_writes_result_and_page(folder: Path, tmp_path: Path) -> None:
    """JSON with all methods, and the same page from it afterwards."""
    pytest.importorskip("cornac")
    path, page = tmp_path / "r.json", tmp_path / "one"
    command = ["recommenders", "--run-folder", str(folder), "--users", "60", "--with", "sasrec"]
    done = CliRunner().invoke(app, [*command, "--epochs", "1", "--json", str(path), "--report", str(page)])
    assert done.exit_code == 0, done.output
    result = Result.read(path)
    found = result.rows_of(recommenders.NAME, RecommenderRow)
    assert [row.method for row in found if row.table == "all"] == [
        "target",
        "draft",
        "popularity",
        "item-knn",
        "item-knn-refitted",
        "sasrec",
    ]
    assert {row.users for row in found} == {60}
    assert result.header["settings"]["sasrec"]["epochs"] == 1
    assert all(row.train_seconds is not None for row in found if row.method == "sasrec")
    assert to_json(found, omit_none=True) == result.rows
    done = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "two")])
    assert done.exit_code == 0, done.output
    text = (page / "recommenders.md").read_text()
    assert text == (tmp_path / "two" / "recommenders.md").read_text()
    assert "| sasrec | " in text
    assert "sasrec: dim 64, blocks 2" in text


def test_missing_library_is_named_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the extra, before any work; the rest of the command does without."""
    for module in ("cornac", "cornac.models", "cornac.data"):
        monkeypatch.setitem(sys.modules, module, None)
    command = ["recommenders", "--run-folder", str(folder), "--users", "5"]
    done = CliRunner().invoke(app, [*command, "--with", "sasrec"])
    assert done.exit_code == 1
    assert "pip install 'atspeed-serving[bench]'" in done.stderr
    assert done.stdout == ""
    assert CliRunner().invoke(app, command).exit_code == 0


def test_folder_without_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="--run-folder"):
        TrainedRun.open(tmp_path, None)
    with pytest.raises(BenchmarkError, match="not one of the benchmark recommenders"):
        Result({"benchmark": "acceptance"}, []).rows_of(recommenders.NAME, RecommenderRow)
