"""The planner study: its clock, its users and machine, and a small run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import BenchmarkError, Result, to_json
from atspeed.engine.search.beams import Beams
from orchestrator.search.policies import Strict
from research.planner_ablation import calibration, fetch, report, serving, study
from research.planner_ablation.clock import Clock, Server
from research.planner_ablation.costs import PRECISIONS, Costs
from research.planner_ablation.serving import Candidate
from research.planner_ablation.study import ADAPTIVE, ALONE, FIXED_OR_NONE, Load, StudyConfig
from research.planner_ablation.users import Users

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), min_size=1, max_size=8))
def test_a_server_makes_one_pass_at_a_time_and_those_of_the_oldest_request_first(
    requests: list[tuple[int, int]],
) -> None:
    """The waits are those of a loop over time steps. Every request makes two passes."""
    clock, found = Clock(), dict[int, list[int]]()
    server = Server(clock)

    async def request(number: int, duration: int) -> None:
        rank = requests[number][0] * 100 + number
        found[number] = [await server.run(duration, rank) for _ in range(2)]

    for number, (arrival, duration) in enumerate(requests):
        clock.start(arrival, request(number, duration))
    clock.run()

    waits: dict[int, list[int]] = {number: [] for number in range(len(requests))}
    waiting = dict[int, int]()  # request -> the time since which it waits
    busy, until = None, 0
    for now in range(2_000):
        if busy is not None and until == now:
            if len(waits[busy]) < 2:
                waiting[busy] = now
            busy = None
        waiting |= {number: now for number, (arrival, _) in enumerate(requests) if arrival == now}
        if busy is None and waiting:
            busy = min(waiting, key=lambda number: (requests[number][0], number))
            waits[busy].append(now - waiting.pop(busy))
            until = now + requests[busy][1]
    assert found == waits


@pytest.mark.parametrize("precision", PRECISIONS)
def test_recorded_costs_are_those_of_the_files(precision: str) -> None:
    costs = Costs.recorded(BENCHMARKS, precision)
    recorded = {row["precision"]: row["pass_ms"] for row in Result.read(BENCHMARKS / "precision.json").rows}
    for tokens, ms in recorded[precision].items():
        assert float(costs.target.predict(int(tokens))) == pytest.approx(ms * 1e6)
    assert (costs.prompt_tokens, costs.new_tokens) == (73, 5)
    assert min(costs.target_call_ns, costs.target_selection_ns, costs.draft_call_ns) > 0


def test_evaluations_are_the_best_children_of_a_table() -> None:
    users = Users(seed=3)
    model, trie = users.user(0).target, users.trie
    nodes = np.array([0, 5, 300])
    evaluation = model.evaluate(nodes, 4)
    evaluation.validate(trie)
    for node, children in evaluation.items():
        ranked = sorted(trie.children(node).tolist(), key=lambda child: -float(model.logp[child]))
        assert children.node.tolist() == ranked[:4]
    sums = [float(np.exp(model.logp[trie.children(node)].astype(np.float64)).sum()) for node in nodes.tolist()]
    assert all(0 < total < 1 for total in sums), "some probability is left for codes that are no children"


def test_a_small_study_has_a_row_for_each_setting_and_candidate_and_a_page(tmp_path: Path) -> None:
    config = StudyConfig(widths=(3,), seeds=2, settle=1, users=2)
    steps: list[tuple[int, int]] = []
    rows = study.run(config, BENCHMARKS, lambda done, total: steps.append((done, total)))
    settings = len(PRECISIONS) * 2 * len(Load)
    assert steps == [(1, 2), (2, 2)]
    names = {row.candidate for row in rows}
    assert len(rows) == settings * len(names)
    assert {row.ratio for row in rows if row.candidate == ADAPTIVE} == {1.0}
    assert {row.target_passes_mean for row in rows if row.candidate == ALONE} == {4.0}
    assert FIXED_OR_NONE in names
    reads = [fetch.FetchRow("int8", "near", 0.9, "4 to 80", rule, 1.0, 1.0, 0.0) for rule in (fetch.MEAN, fetch.ALWAYS)]
    checks = [calibration.CalibrationRow(3, "2k", 0.5, 0.55)]
    found = [*to_json(rows, kind=study.NAME), *to_json(reads, kind=fetch.NAME)]
    found += to_json(checks, kind=calibration.NAME)
    page = report.write(Result(provenance(None, seed=1) | study.header(config), found), tmp_path)
    text = page.read_text()
    assert all(name in text for name in names)
    assert text.count("| float32 | 3 | cold |") == len(Load)


def test_a_list_that_is_not_the_targets_own_fails_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """One candidate returns its lists in the reverse order."""
    made = study.candidates

    class Wrong(Strict):
        def final(self, beams: Beams) -> Beams:
            return beams.take(slice(None, None, -1))

    def two(costs: Costs, users: Users, clock: Clock) -> dict[str, Callable[[], Candidate]]:
        found = made(costs, users, clock)
        return {ALONE: found[ALONE], "wrong": found[ADAPTIVE]}

    policies = iter([Strict, Strict, Wrong, Wrong])
    monkeypatch.setattr(study, "candidates", two)
    monkeypatch.setattr(serving, "Strict", lambda widths: next(policies)(widths))
    with pytest.raises(BenchmarkError, match="the lists of wrong are not the target's own"):
        study.run(StudyConfig((3,), 1, 0, 2), BENCHMARKS, lambda done, total: None)


def test_reads_by_their_mean_time_take_no_longer_than_by_a_line() -> None:
    """One case of the page: a far Redis that mostly finds what is asked for."""
    curve = Costs.recorded(BENCHMARKS, "float32").target
    mean, always = fetch._rows(curve, "float32", "far", 0.9, (64, 80))
    assert (mean.rule, always.rule) == (fetch.MEAN, fetch.ALWAYS)
    assert mean.list_ratio == pytest.approx(1.0, abs=0.02)
