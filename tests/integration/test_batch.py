"""`atspeed batch`: every user once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from typer.testing import Result

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.recommender import Recommender, RecommenderOptions
from atspeed.local.stack import LocalStack
from tests import command_line
from tests.bundles import random_history
from tests.serving import LIVENESS_SECONDS, Client

USERS, CHUNK = 40, 4
KILLS = [3, pytest.param(20, marks=pytest.mark.long)]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def histories(catalogue: Catalogue) -> dict[str, list[str]]:
    return {f"user {number}": random_history(catalogue, 1 + number % 9, number) for number in range(USERS)}


@pytest.fixture
def users(tmp_path: Path, histories: dict[str, list[str]]) -> Path:
    return write_users(tmp_path / "users.jsonl", [{"user_id": u, "history": h} for u, h in histories.items()])


@pytest.fixture(scope="module")
def expected(bundle: Path, histories: dict[str, list[str]]) -> Iterator[dict[str, list[str]]]:
    """The lists of target-only search, one at a time."""
    with Recommender(bundle, RecommenderOptions(threads=1, warm_up_seconds=0, draft=False)) as recommender:
        yield {user: recommender.recommend(history, mode="target-only").item_ids for user, history in histories.items()}


def write_users(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(users: Path, out: Path, bundle: Path, *options: str) -> list[str]:
    fixed = ("--out", str(out), "--bundle", str(bundle), "--chunk-users", str(CHUNK), "--threads", "1")
    return [sys.executable, "-m", "atspeed.cli.main", "batch", str(users), *fixed, *options]


def run(users: Path, out: Path, bundle: Path, *options: str) -> Result:
    return command_line.run(*command(users, out, bundle, *options)[3:])


def lists(out: Path) -> list[Row]:
    """The rows of all files, by chunk."""
    rows: list[Row] = []
    for path in sorted(out.glob("chunk-*")):
        if path.suffix == ".parquet":
            rows += parquet.read_table(path).to_pylist()
        else:
            rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def assert_complete(out: Path, expected: dict[str, list[str]]) -> None:
    """Every user once, in order, with the list of target-only search; and nothing else in the folder."""
    rows = lists(out)
    assert [row["user_id"] for row in rows] == list(expected)
    assert {row["user_id"]: row["item_ids"] for row in rows} == expected
    assert all(len(row["scores"]) == len(row["item_ids"]) and row["exact"] and not row["error"] for row in rows)
    assert all(name.name.startswith(("chunk-", "run.json")) for name in out.iterdir())


class TestLists:
    def test_are_those_of_target_only_search(
        self, users: Path, bundle: Path, tmp_path: Path, expected: dict[str, list[str]]
    ) -> None:
        """In a process of its own: standard output is the summary alone, without a line of a log."""
        asked = command(users, tmp_path / "lists", bundle)
        done = subprocess.run(asked, capture_output=True, text=True, timeout=LIVENESS_SECONDS, check=True)
        assert done.stdout == (
            f"{tmp_path / 'lists'}: {USERS} users, 0 new ones without a list, 0 were there already\n"
        )
        assert_complete(tmp_path / "lists", expected)

    def test_from_parquet_to_json_lines(
        self,
        bundle: Path,
        tmp_path: Path,
        histories: dict[str, list[str]],
        expected: dict[str, list[str]],
    ) -> None:
        table = pyarrow.table({"user_id": list(histories), "history": list(histories.values()), "age": [1] * USERS})
        parquet.write_table(table, tmp_path / "users.parquet")
        done = run(tmp_path / "users.parquet", tmp_path / "lists", bundle, "--format", "jsonl")
        assert done.exit_code == 0, done.stderr
        assert_complete(tmp_path / "lists", expected)

    def test_of_shards_are_a_partition(
        self, users: Path, bundle: Path, tmp_path: Path, expected: dict[str, list[str]]
    ) -> None:
        out = tmp_path / "lists"
        found = []
        for part in ("1/3", "2/3", "3/3"):
            done = run(users, out, bundle, "--shard", part)
            assert done.exit_code == 0, done.stderr
            found.append(len(lists(out)))
        assert found == [16, 28, 40]
        assert_complete(out, expected)

    def test_that_cannot_be_made_say_why(self, bundle: Path, tmp_path: Path, histories: dict[str, list[str]]) -> None:
        user, history = next(iter(histories.items()))
        rows: list[Row] = [
            {"user_id": "stranger", "history": ["no such item"]},
            {"user_id": user, "history": history},
            {"user_id": "new"},
        ]
        done = run(write_users(tmp_path / "users.jsonl", rows), tmp_path / "lists", bundle)
        assert done.exit_code == 0
        assert "3 users, 2 new ones without a list" in done.stdout
        stranger, known, new = lists(tmp_path / "lists")
        assert stranger["error"].startswith("INVALID_ARGUMENT: history: none of its 1 history items")
        assert new["error"] == "INVALID_ARGUMENT: history: the history is empty"
        assert (stranger["item_ids"], new["item_ids"], len(known["item_ids"]), known["error"]) == ([], [], 10, None)


class TestFromAService:
    """Without --bundle, a running service makes the lists."""

    def run(self, users: Path, out: Path, address: str, *options: str) -> Result:
        return command_line.run("batch", users, "--out", out, "--address", address, "--chunk-users", CHUNK, *options)

    def test_are_those_of_target_only_search(
        self, stack: LocalStack, users: Path, tmp_path: Path, expected: dict[str, list[str]]
    ) -> None:
        done = self.run(users, tmp_path / "lists", stack.address, "--timeout", "60")
        assert done.exit_code == 0, done.stderr
        assert_complete(tmp_path / "lists", expected)
        assert len({row["recommendation_id"] for row in lists(tmp_path / "lists")}) == USERS

    def test_of_stored_histories(self, client: Client, tmp_path: Path, histories: dict[str, list[str]]) -> None:
        user, history = next(iter(histories.items()))
        client.record(user, history)
        users = write_users(tmp_path / "users.jsonl", [{"user_id": user}, {"user_id": "nobody"}])
        done = self.run(users, tmp_path / "lists", client.address)
        assert done.exit_code == 0, done.stderr
        stored, nobody = lists(tmp_path / "lists")
        assert stored["item_ids"] == [item.item_id for item in client.recommend(history, k=10).items]
        assert nobody["error"] == "NOT_FOUND: user_id: no history is stored for this user"

    def test_a_service_that_is_away_ends_the_batch(self, users: Path, tmp_path: Path) -> None:
        """It is no user's fault, so no row says so: the same command continues when the service is back."""
        done = self.run(users, tmp_path / "lists", "127.0.0.1:1", "--timeout", "0.5")
        assert done.exit_code == 69
        assert "UNAVAILABLE" in done.stderr or "DEADLINE_EXCEEDED" in done.stderr
        assert lists(tmp_path / "lists") == []


class TestInterrupted:
    @pytest.mark.parametrize("kills", KILLS)
    def test_killed_at_any_moment(
        self, users: Path, bundle: Path, tmp_path: Path, expected: dict[str, list[str]], kills: int
    ) -> None:
        """kill -9: what is there is complete, and the same command makes the rest."""
        out = tmp_path / "lists"
        random = np.random.default_rng(kills)
        for _ in range(kills):
            before = len(list(out.glob("chunk-*")))
            with subprocess.Popen(command(users, out, bundle), stderr=subprocess.DEVNULL) as process:
                wait_for_chunks(out, before + 1, process)
                time.sleep(float(random.uniform(0, 0.05)))
                process.kill()
            if len(list(out.glob("chunk-*"))) == USERS // CHUNK:
                break
        assert {len(rows_of(path)) for path in out.glob("chunk-*")} == {CHUNK}
        done = run(users, out, bundle)
        assert done.exit_code == 0, done.stderr
        assert_complete(out, expected)

    def test_a_part_of_a_file_from_a_killed_process_goes(
        self, users: Path, bundle: Path, tmp_path: Path, expected: dict[str, list[str]]
    ) -> None:
        out = tmp_path / "lists"
        assert run(users, out, bundle, "--shard", "1/9").exit_code == 0
        (out / ".chunk-00000003.parquet.1.partial").write_bytes(b"half")
        assert run(users, out, bundle).exit_code == 0
        assert_complete(out, expected)

    def test_terminated(self, users: Path, bundle: Path, tmp_path: Path, expected: dict[str, list[str]]) -> None:
        """SIGTERM: exit code 75, "try again"."""
        out = tmp_path / "lists"
        with subprocess.Popen(command(users, out, bundle), stderr=subprocess.PIPE, text=True) as process:
            wait_for_chunks(out, 1, process)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=LIVENESS_SECONDS)
        assert process.returncode == 75, errors
        assert "run the same command again to continue" in errors
        assert run(users, out, bundle).exit_code == 0
        assert_complete(out, expected)


class TestRefused:
    @pytest.fixture
    def begun(self, users: Path, bundle: Path, tmp_path: Path) -> Path:
        assert run(users, tmp_path / "lists", bundle, "--shard", "1/9").exit_code == 0
        return tmp_path / "lists"

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (("--k", "7"), "k: the run began with 10, not 7; use another --out"),
            (("--mode", "target-only"), "mode: the run began with 'strict', not 'target-only'; use another --out"),
            (("--chunk-users", "5"), "chunk_users: the run began with 4, not 5; use another --out"),
        ],
    )
    def test_a_resumed_run_that_asks_otherwise(
        self, begun: Path, users: Path, bundle: Path, options: tuple[str, ...], problem: str
    ) -> None:
        before = {path: path.stat().st_mtime_ns for path in begun.iterdir()}
        done = run(users, begun, bundle, *options)
        assert done.exit_code == 1
        assert problem in done.stderr
        assert {path: path.stat().st_mtime_ns for path in begun.iterdir()} == before

    def test_a_shard_that_there_is_not(self, users: Path, bundle: Path, tmp_path: Path) -> None:
        done = run(users, tmp_path / "lists", bundle, "--shard", "4/3")
        assert done.exit_code == 2
        assert "'--shard': '4/3' is not I/N with I from 1 to N" in done.stderr
        assert not (tmp_path / "lists").exists()

    def test_parquet_without_its_package_before_the_first_list(
        self, users: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        done = run(users, tmp_path / "lists", bundle)
        assert done.exit_code == 1
        assert "pip install 'atspeed-serving[parquet]'" in done.stderr
        assert not (tmp_path / "lists").exists()

    def test_other_users(self, begun: Path, users: Path, bundle: Path) -> None:
        users.write_text(users.read_text() + '{"user_id": "late", "history": ["item-1"]}\n')
        assert "users_sha256: the run began with" in run(users, begun, bundle).stderr

    def test_a_file_of_lists_that_was_cut(self, begun: Path, users: Path, bundle: Path) -> None:
        path = begun / "chunk-00000000.parquet"
        os.truncate(path, 100)
        done = run(users, begun, bundle)
        assert done.exit_code == 1
        assert f"{path}: is no Parquet file that can be read" in done.stderr

    def test_a_folder_of_other_files(self, users: Path, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("notes")
        assert "is not empty, and no run began there" in run(users, tmp_path / "mine", bundle).stderr

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ('{"user_id": "a", "history": "50,172"}', "line 1: history: is not a list of item ids (text)"),
            ('\n{"user_id": 5, "history": []}', "line 2: user_id: '5' is no id (text)"),
            ('{"user_id": "a", "user_id": "b"}', "line 1: the key 'user_id' occurs more than once"),
            ("[]", "line 1: is not an object with user_id and history"),
        ],
    )
    def test_a_line_of_users(self, bundle: Path, tmp_path: Path, content: str, problem: str) -> None:
        path = tmp_path / "users.jsonl"
        path.write_text(content + "\n")
        done = run(path, tmp_path / "lists", bundle)
        assert done.exit_code == 1
        assert f"{path}: {problem}" in " ".join(done.stderr.split("\n"))


def rows_of(path: Path) -> list[Row]:
    rows: list[Row] = parquet.read_table(path).to_pylist()
    return rows


def wait_for_chunks(out: Path, count: int, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + LIVENESS_SECONDS
    while len(list(out.glob("chunk-*"))) < count and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)
