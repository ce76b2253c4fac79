"""`atspeed recommend`, `record`, `history`, `forget` and `info` against real services."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
from rich.console import Console

from atspeed.cli import display
from atspeed.engine.bundle.manifest import read_manifest, write_manifest
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from atspeed_client.reading import to_recommendation
from atspeed_client.v1 import recommendation_pb2 as pb
from tests.bundles import TestBundle, write_bundle
from tests.catalogues import random_catalogue
from tests.command_line import one_line, run
from tests.conftest import mended


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    return write_bundle(tmp_path_factory.mktemp("calls") / "bundle", random_catalogue(200, (12, 10, 8), seed=2))


@pytest.fixture(scope="module")
def address(made: TestBundle, redis_server: LocalRedis) -> Iterator[str]:
    with LocalStack(made.root, redis_url=mended(redis_server)) as stack:
        yield stack.address


def test_record_recommend_history_forget(address: str) -> None:
    """A user's life on the command line."""
    recorded = run("record", "alice", "item-1,item-2", "[red]gone", "--address", address)
    assert recorded.stdout == "alice: 3 items\n"
    assert recorded.stderr == "warning: stored, but not in the catalogue: [red]gone\n"
    shown = run("recommend", "alice", "-k", 4, "--exclude-seen", "--address", address)
    assert shown.exit_code == 0, shown.output
    assert len(re.findall(r"item-\d+ ", shown.stdout)) == 4
    assert re.search(r"strict, exact: [1-3] target passes, [0-2] levels accepted, [\d.]+ ms", shown.stdout)
    assert run("history", "alice", "--address", address).stdout.split() == ["item-1", "item-2", "[red]gone"]
    assert run("forget", "alice", "--address", address).stdout == "forgotten\n"
    assert run("forget", "alice", "--address", address).stdout == "nothing was stored\n"
    unknown = run("history", "alice", "--address", address)
    assert (unknown.stdout, unknown.stderr) == ("", "warning: nothing is stored for alice\n")


@pytest.mark.parametrize(
    ("written", "items"),
    [
        (["item-1", "item-2", "item-1"], ["item-1", "item-2", "item-1"]),
        (["item-1,item-2", "item-1"], ["item-1", "item-2", "item-1"]),
        (["item-1, item-2 ,item-1"], ["item-1", "item-2", "item-1"]),
        (['"a,b",item-1', 'c"d'], ["a,b", "item-1", 'c"d']),
        (["--", "-1", "é漢"], ["-1", "é漢"]),
    ],
)
def test_item_lists_have_one_form_for_all_commands(written: list[str], items: list[str], address: str) -> None:
    """`record` and `recommend --history` understand the same text, whether commas or spaces stand between the ids."""
    assert run("record", "--address", address, "speller", *written).exit_code == 0
    assert run("history", "speller", "--address", address).stdout.splitlines() == items
    assert run("forget", "speller", "--address", address).exit_code == 0
    options = [f"--history={value}" for value in written if value != "--"]
    reply = run("recommend", *options, "--history=item-9", "--json", "--address", address)
    known = [item for item in [*items, "item-9"] if item.startswith("item-")]
    answered = json.loads(reply.stdout)
    assert answered["unknown_history_item_ids"] == [item for item in items if item not in known]
    assert answered["history_items_used"] == len(known)


def test_beam_widths_are_given_level_by_level(address: str) -> None:
    def reply(*options: object) -> dict[str, Any]:
        asked = run("recommend", "--history=item-3", "-k", 4, "--json", "--address", address, *options)
        return json.loads(asked.stdout)  # type: ignore[no-any-return]

    assert reply("--beam-width", 6)["beam_width"] == 6
    per_level = reply("--beam-width", 2, "--beam-width", 6, "--beam-width", 5)
    assert (per_level["beam_width"], per_level["beam_widths"]) == (6, [2, 6, 5])
    refused = run("recommend", "--history=item-3", "--beam-width", 0, "--beam-width", 6, "--address", address)
    assert (refused.exit_code, "beam_widths[0]: must be between 1" in refused.stderr) == (2, True)


def test_a_tenants_users_are_its_own(address: str) -> None:
    """The same name, two users."""
    ours, theirs = ("--address", address), ("--tenant", "shop", "--address", address)
    run("record", "bob", "item-1", *ours)
    assert run("history", "bob", *theirs).stdout == ""
    assert "NOT_FOUND: user_id" in one_line(run("recommend", "bob", *theirs))
    assert run("record", "bob", "item-2", "item-3", *theirs).stdout == "bob: 2 items\n"
    assert run("recommend", "bob", "--k", 2, *theirs).exit_code == 0
    assert run("forget", "bob", *theirs).stdout == "forgotten\n"
    assert run("history", "bob", *ours).stdout.split() == ["item-1"]


def test_recommend_for_a_history_as_json(address: str) -> None:
    """Strict and target-only agree; what is excluded stays out; only what is allowed comes in."""

    def items(*options: object) -> list[str]:
        result = run("recommend", "--history", "item-3, item-4", "--json", "--address", address, *options)
        assert result.exit_code == 0, result.output
        return [item["item_id"] for item in json.loads(result.stdout)["items"]]

    strict = items("-k", 5)
    assert strict == items("--k", 5, "--mode", "target-only")
    assert strict[0] not in items("-k", 5, "--exclude", strict[0])
    assert set(items("-k", 5, "--only", f"{strict[1]},{strict[2]}")) == {strict[1], strict[2]}
    sampled = items("-k", 5, "--mode", "exact-sampling", "--seed", 3, "--temperature", 2)
    assert sampled == items("-k", 5, "--mode", "exact-sampling", "--seed", 3, "--temperature", 2)


def test_ids_that_the_catalogue_does_not_know_are_warned_about(address: str) -> None:
    """A list that misses what was asked for looks like any other."""
    options = ["--history", "item-3,gone", "--exclude", "item-4,misspelt", "--only", "item-5,item-6,wrong"]
    shown = run("recommend", *options, "--address", address)
    assert shown.stderr.splitlines() == [
        "warning: not in the catalogue: gone",
        "warning: 1 of the excluded ids not in the catalogue",
        "warning: 1 of the allowed ids not in the catalogue",
    ]
    many = ",".join(f"gone-{number}" for number in range(12))
    recorded = run("record", "long", many, "--address", address)
    assert recorded.stderr.endswith("gone-8, gone-9 and 2 more\n")
    assert run("forget", "long", "--address", address).exit_code == 0


@pytest.fixture(scope="module")
def lenient(made: TestBundle, redis_server: LocalRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same models under a bundle that allows an empty history."""
    root = tmp_path_factory.mktemp("lenient") / "bundle"
    shutil.copytree(made.root, root)
    write_manifest(root, read_manifest(root).model_copy(update={"allow_empty_history": True}))
    with LocalStack(root, redis_url=redis_server.url, drafts=0) as stack:
        yield stack.address


@pytest.mark.parametrize(
    ("arguments", "reason", "said"),
    [
        (["nobody"], "no-stored-history", "no history is stored for this user"),
        (["--history", ""], "empty-history", "the history is empty"),
        (["--history", "unheard-of"], "unknown-items", "no item of the history is in the catalogue"),
    ],
)
def test_list_without_history_warns(arguments: list[str], reason: str, said: str, lenient: str) -> None:
    """It is the list of users without a history, not this user's."""
    shown = run("recommend", *arguments, "--address", lenient)
    assert shown.exit_code == 0, shown.output
    assert shown.stderr.startswith(f"warning: {said}: this list is the same for every user without a history\n")
    as_json = run("recommend", *arguments, "--json", "--address", lenient)
    assert json.loads(as_json.stdout)["cold_start"] == reason


def test_info(made: TestBundle, address: str) -> None:
    """The state of the services, as JSON."""
    answered = json.loads(run("info", "--address", address).stdout)
    assert answered["bundle_name"] == "random"
    assert {backend["name"]: backend["available"] for backend in answered["backends"]} == {
        "target": True,
        "draft": True,
        "redis": True,
    }
    assert all(answered[limit] > 0 for limit in ("max_k", "max_history_items", "max_candidate_items", "max_batch"))
    assert answered["versions"]["bundle"] == made.bundle.manifest.version


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["recommend", "nobody"], "NOT_FOUND: user_id", 1),
        (["recommend", "--history", "item-1", "-k", 100_000], "INVALID_ARGUMENT: k: must be between", 2),
        (["recommend", "--history", "item-1", "--tolerance", 0.1], "INVALID_ARGUMENT: tolerance", 2),
        (["recommend", "--history", "unheard-of"], "INVALID_ARGUMENT: history", 2),
    ],
)
def test_a_refused_call_shows_its_status(arguments: list[object], status: str, code: int, address: str) -> None:
    """The gRPC status and the service's own words, with an exit code of the kind of error."""
    assert status in one_line(run(*arguments, "--address", address), code)


def test_unreachable_service_is_unavailable() -> None:
    """No service at the address."""
    assert "UNAVAILABLE" in one_line(run("info", "--address", "127.0.0.1:1"), 69)


def test_a_long_id_is_shown_whole() -> None:
    console = Console(width=80, file=io.StringIO())
    items = [pb.RecommendedItem(rank=1, item_id="x" * 200, code_path=[1, 2, 3])]
    reply = to_recommendation(pb.RecommendResponse(items=items), "")
    with console.capture() as shown:
        console.print(display.recommendation_table(reply))
    assert shown.get().count("x") == 200


def test_every_call_prints_json_on_demand(address: str) -> None:
    run("record", "jason", "item-1,item-2", "--address", address)
    stored = json.loads(run("history", "jason", "--json", "--address", address).stdout)["events"]
    assert [event["item_id"] for event in stored] == ["item-1", "item-2"]
    assert json.loads(run("forget", "jason", "--json", "--address", address).stdout) == {"existed": True}
    assert json.loads(run("forget", "jason", "--json", "--address", address).stdout) == {"existed": False}
    assert json.loads(run("info", "--json", "--address", address).stdout) == json.loads(
        run("info", "--address", address).stdout
    )


def test_version_and_short_help() -> None:
    assert run("--version").stdout == f"atspeed {version('atspeed-serving')}\n"
    for command in ([], ["recommend"], ["bundle", "inspect"], ["bench", "parity"]):
        assert run(*command, "-h").stdout == run(*command, "--help").stdout != ""
