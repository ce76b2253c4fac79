"""`bench scaling` on small catalogues in real processes, and the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atspeed.benchmarks import scaling, scaling_report
from atspeed.benchmarks.catalogue_probe import Probe
from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import BenchmarkError, Result
from atspeed.benchmarks.scaling import CatalogueConfig, CatalogueRow, SearchConfig, SearchRow, synthetic_catalogue
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue

EXCLUDED = {"excluded_constraint_ms": 1.0, "excluded_selection_ms": 1.0}
CONFIG = CatalogueConfig(sizes=(300,), codebook=8, k=5, excluded=200)


def test_synthetic_catalogue_is_valid() -> None:
    catalogue = synthetic_catalogue(2000, (16,) * 4, seed=1)
    catalogue.trie.check_integrity()
    ids = [catalogue.id_of(item) for item in range(catalogue.items)]
    assert sorted(ids) == [f"B{number:09d}" for number in range(2000)]
    assert catalogue.find(ids).tolist() == list(range(2000))
    assert catalogue.trie.nodes < 16 * 2000  # some prefixes are shared
    assert synthetic_catalogue(2000, (16,) * 4, seed=1).version == catalogue.version
    assert (np.diff(catalogue.trie.level_start) > 1)[1:].all()


def test_catalogue_is_measured_in_its_own_process(tmp_path: Path) -> None:
    rows = scaling.measure_catalogues(CONFIG)
    assert [row.items for row in rows] == [300]
    for row in rows:
        assert row.nodes[0] == 1
        assert row.disk_bytes > 10 * row.items
        assert row.probe.constraint_ms > 0
        assert row.probe.peak_bytes >= row.probe.resident_bytes >= 0
    result = Result(provenance(None, seed=1) | scaling.header(CONFIG, None), scaling.rows_to_json(rows, []))
    result.write(tmp_path / "scaling.json")
    read = Result.read(tmp_path / "scaling.json")
    assert read.rows_of("scaling", CatalogueRow, kind="catalogue") == [
        replace(row, codebook_sizes=[8] * 4) for row in rows
    ]
    page = scaling_report.write(read, tmp_path).read_text()
    assert "| 300 |" in page
    assert (tmp_path / "scaling.svg").read_text().startswith("<?xml")
    assert scaling.tables(rows, [])[0].row_count == len(scaling.CATALOGUE_COLUMNS) - 1


def test_unreadable_catalogue_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"ids\.npy"):
        scaling._probe(tmp_path, CONFIG)


async def test_searches_cover_beams_and_prompts(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, random_catalogue(60, (4, 4, 4), seed=0), max_items=8)
    config = SearchConfig(widths=(1, 3), k=2, repeats=2)
    rows = await scaling.measure_searches(bundle.root, config)
    shapes = [(row.k, row.history_items, row.cold) for row in rows]
    expected = [(1, 8), (3, 8), (2, 1), (2, 2), (2, 4)]
    assert shapes == [(k, items, cold) for k, items in expected for cold in (True, False)]
    assert {row.passes for row in rows} == {3}
    assert len({row.prompt_tokens for row in rows}) == 4
    read = Result({"benchmark": "scaling"}, scaling.rows_to_json([], rows))
    assert read.rows_of("scaling", CatalogueRow, kind="catalogue") == []
    assert read.rows_of("scaling", SearchRow, kind="search") == rows


def test_share_of_a_pass_is_of_the_warm_search_with_longest_prompt(tmp_path: Path) -> None:
    """1 ms is added to a pass of 9 ms (36 ms for 4 passes). Cold searches and shorter prompts do not count."""
    probe = Probe(61.0, 10**9, 2 * 10**9, 1.0, 1.0, 1.0, constraint_ms=0.6, selection_ms=0.4, **EXCLUDED)
    catalogue = CatalogueRow(10**7, (8,) * 4, (1, 2), 1.0, 10**8, probe)
    warm = SearchRow(5, 20, 81, cold=False, passes=4, search_ms=40.0, forward_ms=36.0, constraint_ms=1.0)
    cold = replace(warm, cold=True, forward_ms=360.0)
    searches = [cold, warm, replace(warm, prompt_tokens=5, forward_ms=4.0), replace(warm, k=1, forward_ms=1.0)]
    header = provenance(None, seed=1) | scaling.header(replace(CONFIG, k=5), SearchConfig())
    page = scaling_report.write(Result(header, scaling.rows_to_json([catalogue], searches)), tmp_path).read_text()
    assert "10,000,000 items: seconds until loaded | 61.0 |" in page
    assert "which takes 9.0 ms in the model | 10.0% |" in page


def test_result_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="benchmark scaling"):
        scaling_report.write(Result({"benchmark": "load"}, []), tmp_path)
