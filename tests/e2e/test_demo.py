"""The demo, as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atspeed.cli.demo import demonstration
from atspeed.cli.demo.checks import Checks, alike
from atspeed.cli.demo.demonstration import choose_users, main
from atspeed.cli.demo.larger_target import BUNDLE, ROOT
from atspeed.training.data import Dataset, leave_last_out
from atspeed_client import Recommendation
from atspeed_client.reading import to_recommendation
from atspeed_client.v1 import recommendation_pb2 as pb


@pytest.mark.skipif(not BUNDLE.is_dir(), reason="the shipped bundle is not trained yet")
def test_the_demo_holds_on_the_shipped_bundle() -> None:
    """With real data and real processes every check holds, and the output names each of them. Two users and two K."""
    smaller = (
        "import sys; from atspeed.cli.demo.demonstration import main; from atspeed.cli.demo.steps import DemoScale; "
        "sys.exit(main(scale=DemoScale(compared=2, widths=(1, 10), rounds=1)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", smaller], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Harper and Konstan 2015" in done.stdout.replace("\n", " ")
    assert done.stdout.count("identical to target-only: yes") == 2
    assert len(re.findall(r"same list for 2 of 2 users", done.stdout)) == 2
    for k in (1, 10):
        assert re.search(rf"^ +{k}( +[\d.]+){{6}} *$", done.stdout, re.MULTILINE), "a row of the table"
        assert f"K = {k}: " in done.stdout
    assert re.search(r"[├└]── [●○◆◇▲·] \d+", done.stdout), "the token tree"
    assert re.search(r"5\. \w+", done.stdout)
    held = re.search(r"(\d+) of (\d+) checks hold", done.stdout)
    assert held
    assert held[1] == held[2]
    assert "Traceback" not in done.stderr


def test_without_a_bundle_it_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and one line."""
    assert main(tmp_path / "none") == 1
    assert "no bundle;" in capsys.readouterr().out


def test_without_the_data_it_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No package index in reach: the wheel's name and pip's own words."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(demonstration, "DOWNLOADS", tmp_path / "downloads")
    assert main(tmp_path) == 1
    assert "pip could not download recbole==1.2.1" in capsys.readouterr().out


def list_of(*items: tuple[str, float]) -> Recommendation:
    """A list of items and their scores."""
    return to_recommendation(pb.RecommendResponse(items=[pb.RecommendedItem(item_id=i, score=s) for i, s in items]), "")


def test_a_list_that_differs_fails_the_demo() -> None:
    """The checks count what they are given."""
    checks = Checks()
    one, other = list_of(("a", -2.0)), list_of(("b", -1.0))
    assert checks.same("alike", one, one)
    assert not checks.same("unlike", one, other)
    assert (checks.made, checks.failed) == (2, ["unlike"])


def test_a_list_with_another_last_bit_fails_the_demo() -> None:
    checks = Checks()
    one, other = (list_of(("a", score)) for score in (-1.0, float(np.nextafter(-1.0, 0.0))))
    assert not checks.same("moved", one, other)
    assert checks.failed == ["moved"]


@pytest.mark.parametrize(
    ("other", "holds"),
    [
        ((("a", -1.0001), ("b", -2.0)), True),
        ((("b", -1.0), ("a", -1.0)), False),  # each place has its score, but b's moved by 1
        ((("a", -1.0), ("c", -2.0001)), True),  # a near-tie at the end
        ((("c", -1.0), ("b", -2.0)), False),  # c should have been in the list
        ((("a", -1.0),), False),
    ],
)
def test_lists_are_alike_but_for_rounding_and_near_ties(other: tuple[tuple[str, float], ...], holds: bool) -> None:
    assert alike(list_of(*other), list_of(("a", -1.0), ("b", -2.0))) == holds


def test_users_are_spread_over_the_data() -> None:
    """Each with all but the last item as history."""
    histories = {str(user): ("a", "b", "c", "d") for user in range(100)}
    dataset: Dataset = leave_last_out("made-up", "", (), histories)
    users = choose_users(dataset, 4)
    assert [case.user for case in users] == ["0", "25", "50", "75"]
    assert users[0].history == ("a", "b", "c")
