"""`research precision`: number formats compared with float32, and the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from atspeed.benchmarks.intervals import Interval
from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import BenchmarkError, Result, to_json
from atspeed.training.models import SpelledModel
from atspeed.training.sequences import Spelling
from research import precision
from research.eval_examples import HeldOutCase
from research.precision import PrecisionConfig, PrecisionRow, TrainedTarget
from tests.bundles import TestBundle, write_bundle
from tests.catalogues import random_catalogue

USERS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    return write_bundle(tmp_path_factory.mktemp("bundle"), random_catalogue(60, (8, 6, 5), seed=4))


@pytest.fixture(scope="module")
def rows(made: TestBundle) -> list[PrecisionRow]:
    entry, catalogue = made.bundle.model("target"), made.bundle.catalogue()
    spelling = Spelling(code_tokens=entry.code_tokens, prompt=entry.prompt, pad_token=0, vocab_size=entry.vocab_size)
    model = SpelledModel(made.target, spelling)
    cases = [HeldOutCase((user, user + 1, user + 2), (user + 3,), seed=user) for user in range(USERS)]
    config = PrecisionConfig(k=12, cached=9)
    return precision.run(TrainedTarget(made.bundle, catalogue, model), model, cases, config)


def test_float32_is_the_reference(rows: list[PrecisionRow]) -> None:
    plain = rows[0]
    assert [row.precision for row in rows] == ["float32", "float16", "int8"]
    assert (plain.identical, plain.overlap) == (USERS, 1.0)
    assert plain.recall_less == plain.ndcg_less == Interval(0.0, 0.0, 0.0)
    assert {row.users for row in rows} == {USERS}


def test_float16_alone_is_changed_by_cobatched_nodes(rows: list[PrecisionRow]) -> None:
    moved = {row.precision: row.moved_by_company for row in rows}
    assert moved["int8"] == moved["float32"] == 0
    assert moved["float16"] > 1e-4


def test_int8_changes_lists_and_has_a_smaller_file(rows: list[PrecisionRow]) -> None:
    plain, _, int8 = rows
    assert 0.5 < int8.overlap < 1
    assert int8.megabytes < plain.megabytes
    assert all(ms > 0 for row in rows for ms in row.pass_ms.values())


def test_page_is_written_from_result_file(made: TestBundle, rows: list[PrecisionRow], tmp_path: Path) -> None:
    about = precision.header(PrecisionConfig(), timed="a target of 9 parameters")
    result = Result(provenance(made.bundle, seed=1) | about, to_json(rows))
    result.write(tmp_path / "precision.json")
    read = Result.read(tmp_path / "precision.json")
    assert read.rows_of(precision.NAME, PrecisionRow) == rows
    text = precision.write(read, tmp_path / "page").read_text()
    assert "| int8 | 0.0e+00 |" in text
    assert "timed of a target of 9 parameters" in text
    assert f"| float32 | {USERS} of {USERS} | 100.0% |" in text
    with pytest.raises(BenchmarkError, match="not one of the benchmark precision"):
        precision.write(replace(result, header={**result.header, "benchmark": "load"}), tmp_path)
