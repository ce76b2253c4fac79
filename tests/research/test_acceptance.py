"""`research acceptance`: counts equal those of cold searches; and the page."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from atspeed.benchmarks import results
from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import write_manifest
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import PlanSize
from atspeed.engine.search.scoring import Perturbation, ScoringRule
from atspeed.engine.search.trie import ROOT
from atspeed.training.data import read_atspeed
from orchestrator.search.policies import ExactSampling, Policy, RelaxedSampling, Strict, Tolerance
from research import acceptance, acceptance_report
from research.__main__ import app
from research.acceptance import AcceptanceConfig, AcceptanceRow, parse_budget
from research.acceptance_search import NO_DRAFT
from research.eval_examples import HeldOutCase, choose_cases, quality
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.datasets import write_dataset
from tests.oracles.models import Models
from tests.research.cold_search import cold_search

LEVELS = 4
USERS = 6
WIDTHS = (1, 4)
BUDGETS = tuple(map(parse_budget, ("2k", "6/level", "9/all")))
MODES = (Mode.STRICT, Mode.TOLERANCE, Mode.EXACT_SAMPLING, Mode.RELAXED_SAMPLING)
TOLERANCE = 0.5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    catalogue = random_catalogue(80, (6, 5, 4, 4), seed=4)
    return Models.load(write_bundle(tmp_path_factory.mktemp("one") / "bundle", catalogue, draft_noise=0.1))


@pytest.fixture(scope="module")
def other(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle of the same target whose draft is the target."""
    root = tmp_path_factory.mktemp("other") / "bundle"
    shutil.copytree(models.bundle.root, root)
    manifest = models.bundle.bundle.manifest
    shutil.copytree(root / "target", root / "draft", dirs_exist_ok=True)
    write_manifest(root, manifest.model_copy(update={"name": "other", "draft": manifest.draft}))
    return Bundle(root)


@pytest.fixture(scope="module")
def data(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), models.catalogue)


@pytest.fixture(scope="module")
def cases(models: Models, data: Path) -> list[HeldOutCase]:
    return choose_cases(read_atspeed(data), models.catalogue, allow_empty=False, users=USERS, seed=3)


@pytest.fixture(scope="module")
def config() -> AcceptanceConfig:
    return AcceptanceConfig(budgets=BUDGETS, widths=WIDTHS, modes=MODES, tolerance=TOLERANCE)


@pytest.fixture(scope="module")
def rows(models: Models, other: Bundle, cases: list[HeldOutCase], config: AcceptanceConfig) -> list[AcceptanceRow]:
    drafts = {"group/seed1": models.bundle.bundle, "group/seed2": other}
    return acceptance.run(models.bundle.bundle, drafts, cases, config)


def policy_of(mode: Mode, k: int, seed: int) -> Policy:
    noise = Perturbation(seed, 1.0)
    policies: dict[Mode, Callable[[], Policy]] = {
        Mode.TARGET_ONLY: lambda: Strict(BeamWidths.of(k)),
        Mode.STRICT: lambda: Strict(BeamWidths.of(k)),
        Mode.TOLERANCE: lambda: Tolerance(BeamWidths.of(k), TOLERANCE),
        Mode.EXACT_SAMPLING: lambda: ExactSampling(BeamWidths.of(k), noise),
        Mode.RELAXED_SAMPLING: lambda: RelaxedSampling(BeamWidths.of(k), noise),
    }
    return policies[mode]()


def row_of(rows: Sequence[AcceptanceRow], draft: str, mode: Mode, k: int, budget: str) -> AcceptanceRow:
    (found,) = [row for row in rows if (row.draft, row.mode, row.k, row.budget) == (draft, str(mode), k, budget)]
    return found


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("mode", [Mode.TARGET_ONLY, *MODES])
async def test_row_equals_counts_of_cold_searches(
    models: Models, cases: list[HeldOutCase], rows: list[AcceptanceRow], mode: Mode, k: int
) -> None:
    """Passes, nodes and the draft's passes are exact for every user, though the searches share a tree."""
    for budget in [None] if mode is Mode.TARGET_ONLY else BUDGETS:
        size = budget.size(k, LEVELS) if budget else None
        cold = [await cold_search(models, case, policy_of(mode, k, case.seed), size) for case in cases]
        row = row_of(rows, "group/seed1" if budget else NO_DRAFT, mode, k, budget.label if budget else "0")
        memos = [search.result.memo for search in cold]
        found = [items(models.catalogue, search.result.leaves.by_score(), k) for search in cold]
        recall = [quality(ranking, case.answers, k).recall for ranking, case in zip(found, cases, strict=True)]
        forced = sum(memo.is_forced(node) for memo in memos for node in memo.used)
        assert row.per_user is not None
        assert row.per_user["target_passes"] == [search.passes for search in cold]
        for counted, expected in (
            (row.target_passes_mean, [search.passes for search in cold]),
            (row.one_pass_share, [search.passes == 1 for search in cold]),
            (row.draft_passes_mean, [search.draft_passes for search in cold]),
            (row.nodes_planned_mean, [len(memo.drafted) for memo in memos]),
            (row.nodes_used_mean, [len(memo.drafted & memo.used) for memo in memos]),
            (row.largest_slack_mean, [memo.largest_slack for memo in memos]),
            (row.forced_share, [forced / sum(len(memo.used - {ROOT}) for memo in memos)]),
            (row.recall[str(k)], recall),
        ):
            assert counted == pytest.approx(np.mean(expected), abs=1e-5)


def items(catalogue: Catalogue, leaves: Beams, k: int) -> list[int]:
    return [item for leaf in leaves.node.tolist() for item in catalogue.items_of(leaf)][:k]


def test_rows_without_a_draft(rows: list[AcceptanceRow]) -> None:
    """One for each K and law, a pass per level, compared with themselves."""
    alone = [row for row in rows if row.draft == NO_DRAFT]
    wanted = {(str(mode), k) for mode in (Mode.TARGET_ONLY, Mode.EXACT_SAMPLING) for k in WIDTHS}
    assert {(row.mode, row.k) for row in alone} == wanted
    for row in alone:
        assert (row.budget, row.target_passes_mean, row.accepted_levels_mean) == ("0", LEVELS, 0)
        assert (row.identical, row.different, row.nodes_planned_mean, row.draft_passes_mean) == (USERS, 0, 0, 0)
        assert row.miss_level == {"1": 1.0, "2": 0.0, "3": 0.0, "none": 0.0}


def test_rows_with_a_draft(rows: list[AcceptanceRow]) -> None:
    """Lossless modes give the target's lists, and shares, levels and passes are consistent."""
    drafted = [row for row in rows if row.draft != NO_DRAFT]
    assert len(drafted) == 2 * len(MODES) * len(WIDTHS) * len(BUDGETS)
    assert [row.mode for row in drafted] == sorted((row.mode for row in drafted), key=[*map(str, MODES)].index)
    for row in drafted:
        assert row.identical + row.near_ties + row.different == USERS
        assert not (row.promises_identity and row.different)
        assert row.accepted_levels_mean == pytest.approx(LEVELS - row.target_passes_mean, abs=1e-5)
        assert row.accepted_levels_mean == pytest.approx(sum(row.accepted_levels), abs=1e-5)
        assert sum(row.miss_level.values()) == pytest.approx(1, abs=1e-5)
        assert row.miss_level["none"] == row.one_pass_share
        assert row.nodes_used_mean <= row.nodes_planned_mean
        assert (row.ndcg_difference is not None) == (row.mode == "relaxed-sampling")
        assert set(row.recall) == {str(row.k)}
    assert any(row.one_pass_share > 0 for row in drafted)
    assert any(row.target_passes_mean > 1 for row in drafted)


def test_draft_equal_to_target_needs_one_pass(
    models: Models, other: Bundle, cases: list[HeldOutCase], config: AcceptanceConfig
) -> None:
    """The plan has K nodes per level: the 2K beams of a wider search need not contain the K of this one."""
    smaller = replace(config, budgets=[parse_budget("1k")], modes=[Mode.STRICT])
    for row in acceptance.run(models.bundle.bundle, {"itself": other}, cases, smaller):
        if row.draft == "itself":
            assert (row.target_passes_mean, row.one_pass_share, row.draft_passes_mean) == (1, 1, LEVELS - 1)
            assert (row.accepted_levels, row.nodes_planned_mean) == ([1, 1, 1], row.nodes_used_mean)


def test_forced_nodes_under_rule_trie_take_no_pass(models: Models, data: Path, tmp_path: Path) -> None:
    """Counts equal those of cold searches under the rule trie, where forced nodes are never evaluated."""
    forced = Models.load(write_bundle(tmp_path, models.catalogue, rule=ScoringRule.TRIE, draft_noise=0.1))
    cases = choose_cases(read_atspeed(data), models.catalogue, allow_empty=False, users=USERS, seed=3)
    budget = parse_budget("2k")
    bundle = forced.bundle.bundle
    rows = acceptance.run(bundle, {"a": bundle}, cases, AcceptanceConfig([budget], WIDTHS, [Mode.STRICT]))
    for row in rows:
        size = None if row.draft == NO_DRAFT else budget.size(row.k, LEVELS)
        cold = [asyncio.run(cold_search(forced, case, Strict(BeamWidths.of(row.k)), size)) for case in cases]
        assert row.per_user is not None
        assert row.per_user["target_passes"] == [search.passes for search in cold]
        assert (row.identical + row.near_ties, row.different) == (USERS, 0)
    assert min(row.target_passes_mean for row in rows if row.draft == NO_DRAFT) < LEVELS


def test_rows_are_independent_of_processes(
    models: Models, cases: list[HeldOutCase], config: AcceptanceConfig, rows: list[AcceptanceRow]
) -> None:
    """Processes load their own models; the order of users stays."""
    drafts = {"group/seed1": models.bundle.bundle}
    smaller = replace(config, workers=2, modes=[Mode.STRICT])
    found = acceptance.run(models.bundle.bundle, drafts, cases, smaller)
    assert found == [row for row in rows if row in found]
    assert len(found) == len(WIDTHS) * (1 + len(BUDGETS))


@pytest.mark.parametrize(
    ("label", "size"),
    [
        ("2k", PlanSize(BeamWidths.of(5), 10, 30)),
        ("40", PlanSize(BeamWidths.of(5), 40, 120)),
        ("120", PlanSize(BeamWidths.of(5), 120, 120)),
        ("240", PlanSize(BeamWidths.of(5), 240, 240)),
        ("7/level", PlanSize(BeamWidths.of(5), 7, 21)),
        ("60/all", PlanSize(BeamWidths.of(5), 60, 60)),
    ],
)
def test_budget_sets_plan_size(label: str, size: PlanSize) -> None:
    """K = 5 over a trie of four levels, three of which can be planned."""
    budget = parse_budget(label)
    assert budget.label == label
    assert budget.size(5, LEVELS) == size


@pytest.mark.parametrize("label", ["", "k", "0k", "80", "2x", "-3/all"])
def test_budget_without_unit_is_refused(label: str) -> None:
    """A budget without a unit is refused."""
    with pytest.raises(BenchmarkError, match="--budget"):
        parse_budget(label)


def test_unsuitable_drafts_are_refused(models: Models, other: Bundle, tmp_path: Path) -> None:
    """Refusals name the option and the problem."""
    bundle = models.bundle.bundle
    elsewhere = write_bundle(tmp_path / "catalogue", random_catalogue(80, (6, 5, 4, 4), seed=5)).bundle
    target = write_bundle(tmp_path / "target", models.catalogue, seed=9).bundle
    shutil.copytree(bundle.root, tmp_path / "draftless")
    write_manifest(tmp_path / "draftless", bundle.manifest.model_copy(update={"draft": None}))
    for option, problem in (
        ("b", "must be NAME=BUNDLE"),
        ("=x", "must be NAME=BUNDLE"),
        (f"a={other.root}", "the name 'a' is taken"),
        (f"none={other.root}", "the name 'none' is taken"),
        (f"b={tmp_path}", "manifest.json"),
        (f"b={elsewhere.root}", "its catalogue is"),
        (f"b={target.root}", "its target is"),
        (f"b={tmp_path / 'draftless'}", "has no draft model"),
    ):
        with pytest.raises(BenchmarkError, match=f"^--draft {option}: .*{problem}"):
            acceptance.draft_bundles(bundle, "a", [option])
    with pytest.raises(BenchmarkError, match=r"^--name none: "):
        acceptance.draft_bundles(bundle, "none", [])
    draftless = Bundle(tmp_path / "draftless")
    with pytest.raises(BenchmarkError, match="--draft NAME=BUNDLE"):
        acceptance.draft_bundles(draftless, "a", [])
    assert list(acceptance.draft_bundles(draftless, "a", [f"b={other.root}"])) == ["b"]
    assert list(acceptance.draft_bundles(bundle, "a", [f"b={other.root}"])) == ["a", "b"]


# --- the page and the command line


@pytest.fixture(scope="module")
def result(models: Models, other: Bundle, config: AcceptanceConfig, rows: list[AcceptanceRow]) -> results.Result:
    from atspeed.benchmarks.provenance import provenance

    bundle = models.bundle.bundle
    about = acceptance.header(
        {"group/seed1": bundle, "group/seed2": other}, config, data="made up", users=USERS, seconds=3.0
    )
    return results.Result(
        provenance(bundle, seed=3, command=["atspeed", "bench"]) | about, acceptance.rows_to_json(rows)
    )


def test_page_is_a_function_of_the_result_file(
    result: results.Result, rows: list[AcceptanceRow], tmp_path: Path
) -> None:
    """Written, read and rendered twice: the same bytes, with every plot and the spread over seeds."""
    result.write(tmp_path / "acceptance.json")
    read = results.Result.read(tmp_path / "acceptance.json")
    assert read.rows_of(acceptance.NAME, AcceptanceRow) == [replace(row, per_user=None) for row in rows]
    page = acceptance_report.write(read, tmp_path / "one")
    acceptance_report.write(read, tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(
        ["acceptance.md", *(f"{plot}-{mode}.svg" for plot in ("one-pass-share", "target-passes") for mode in MODES)]
    )
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = page.read_text()
    assert all(f"]({name})" in text for name in files if name.endswith(".svg"))
    assert all(f"## {mode}" in text for mode in MODES)
    means = [row_of(rows, draft, Mode.STRICT, 4, "2k").target_passes_mean for draft in ("group/seed1", "group/seed2")]
    spread = f"{np.mean(means):.3f} ({min(means):.3f} – {max(means):.3f}, sd {np.std(means, ddof=1):.3f})"
    assert f"| 4 | group | {spread} |" in text
    assert "made up" in text


def test_result_of_another_benchmark_is_refused(result: results.Result, tmp_path: Path) -> None:
    """A file that is no result is refused too."""
    other = results.Result({"benchmark": "lossless"}, [])
    with pytest.raises(BenchmarkError, match="benchmark acceptance"):
        acceptance_report.write(other, tmp_path)
    (tmp_path / "text").write_text("{}")
    for path in (tmp_path / "text", tmp_path / "missing"):
        with pytest.raises(BenchmarkError, match=path.name):
            results.Result.read(path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_command_writes_result_and_page(models: Models, other: Bundle, data: Path, tmp_path: Path) -> None:
    """Strict for two drafts, with JSON and page; and the page again from the JSON."""
    file, folder = tmp_path / "result" / "acceptance.json", tmp_path / "page"
    asked = f"--users 4 --workers 1 --draft x/seed1={other.root} --name own --k 3 --k 12 --budget 2k --budget 240"
    files = f"--mode strict --per-user --json {file} --report {folder}"
    done = run("acceptance", "--bundle", models.bundle.root, "--data", data, *asked.split(), *files.split())
    assert done.exit_code == 0, done.output
    assert "identical to the target alone: yes (40 identical" in done.stdout
    written = json.loads(file.read_text())
    assert written["header"]["drafts"].keys() == {"own", "x/seed1"}
    assert [(row["draft"], row["mode"], row["k"], row["budget"]) for row in written["rows"]] == [
        ("none", "target-only", 3, "0"),
        ("none", "target-only", 12, "0"),
        *((draft, "strict", k, budget) for draft in ("own", "x/seed1") for k in (3, 12) for budget in ("2k", "240")),
    ]
    assert list(written["rows"][1]["recall"]) == ["5", "10", "12"]
    assert all(len(row["per_user"]["target_passes"]) == 4 for row in written["rows"])
    assert run("report", file, "--out", tmp_path / "again").exit_code == 0
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_command_names_option_when_it_fails(
    models: Models, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the option, and exit code 1."""
    known = ["acceptance", "--bundle", models.bundle.root, "--data", data]
    for arguments, problem in (
        ([*known, "--draft", f"b={tmp_path}"], "--draft b="),
        ([*known, "--budget", "80"], "--budget 80"),
        ([*known[:3], "--data", tmp_path], "items.jsonl"),
    ):
        refused = run(*arguments)
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1), refused.output
        assert problem in refused.stderr
    for module in ("research.acceptance_report", "atspeed.benchmarks.plots"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = run(*known, "--report", tmp_path)
    assert refused.exit_code == 1
    assert "matplotlib is not installed: pip install 'atspeed-serving[bench]'" in refused.stderr


def test_command_refuses_mode_target_only(models: Models, data: Path) -> None:
    refused = run("acceptance", "--bundle", models.bundle.root, "--data", data, "--mode", "target-only")
    assert refused.exit_code == 2
    assert "does not speculate" in refused.stderr
