"""A prompt with fields of users behind the real services: lists, refusals, cached prompts and their erasure."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis

from atspeed.benchmarks.near_ties import compare
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.kv.redis_store import user_blocks_name
from atspeed.engine.search.list_comparison import RankedList
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.user_key import user_cache_key
from tests.checkpoints import MadeCheckpoint, make_checkpoint, random_paths
from tests.command_line import one_line, run
from tests.generated import generated
from tests.serving import LIVENESS_SECONDS, Client, assert_same_list, until

PROMPT = "Items are recommended to a user of age {age} who is {sex}: {history}\n\n### Response:\n"
AGES, SEXES = ["18-24", "25-34", "56+"], ["F", "M"]
K = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    made = make_checkpoint(tmp_path_factory.mktemp("made"), random_paths(60, 3), users=8)
    users = ({"user": age + sex, "age": age, "sex": sex} for age, sex in product(AGES, SEXES))
    (made.folder.parent / "users.jsonl").write_text("\n".join(map(json.dumps, users)))
    (made.folder.parent / "prompt.txt").write_text(PROMPT)
    return made


@pytest.fixture(scope="module")
def bundle(made: MadeCheckpoint) -> Path:
    folder = made.folder.parent
    files = ("--index", made.index, "--histories", made.histories, "--out", folder / "bundle")
    users = ("--user-fields", folder / "users.jsonl", "--user-default", "sex=F")
    done = run("import", made.folder, *files, *users, "--prompt", folder / "prompt.txt", "--max-items", 10)
    assert done.exit_code == 0, done.output
    return folder / "bundle"


@pytest.fixture(scope="module")
def stack(bundle: Path, redis_server: LocalRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    kept: dict[str, object] = {
        "kv-redis": "always",
        "redis-timeout-seconds": 10,
        "warm-up-seconds": 0,
        "kv-block-tokens": 4,
    }
    flags = {"target": kept, "orchestrator": {"redis-timeout-seconds": 10, "planner": "fixed"}}
    logs = tmp_path_factory.mktemp("logs")
    with LocalStack(bundle, redis_url=redis_server.url, drafts=0, log_folder=logs, flags=flags) as stack:
        yield stack


@pytest.fixture
def client(redis_url: str, stack: LocalStack) -> Iterator[Client]:
    with Client(stack.address) as client:
        yield client


def came(condition: Callable[[], Any]) -> bool:
    """Return whether a condition holds within two seconds."""
    end = time.monotonic() + 2
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def users_tokens(made: MadeCheckpoint, history: list[str], user: dict[str, str]) -> list[int]:
    """The user's own text through the tokenizer."""
    items = ", ".join("".join(made.paths[item]) for item in history[-10:])
    tokens: list[int] = made.tokenizer(PROMPT.format(history=items, **user))["input_ids"]
    return tokens


def test_lists_are_those_of_generate_on_the_users_text(made: MadeCheckpoint, client: Client) -> None:
    lists = {}
    for number, (age, sex) in enumerate(product(AGES, SEXES)):
        history, user = made.users[number], {"age": age, "sex": sex}
        wanted = generated(made, users_tokens(made, history, user), [], K)
        for mode in (pb.MODE_TARGET_ONLY, pb.MODE_STRICT):
            reply = client.recommend(history, user_fields=user, k=K, beam_width=K, mode=mode)
            found = RankedList.of(reply.items)
            assert str(compare(found, wanted)) != "different"
            assert found.scores == pytest.approx(wanted.scores, abs=1e-3)
        same = client.recommend(made.users[0], user_fields=user, k=K, beam_width=K)
        lists[age, sex] = [item.score for item in same.items]
    assert len({tuple(scores) for scores in lists.values()}) == len(lists)  # no value is without effect
    assert [item.score for item in client.recommend(made.users[0], user_fields={"age": "56+"}, k=K, beam_width=K).items] == (
        lists["56+", "F"]  # the default
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "violations"),
    [
        ({}, {"user_fields.age": "is missing"}),
        ({"age": "99"}, {"user_fields.age": "must be one of the bundle's values: 18-24, 25-34, 56+"}),
        ({"age": "56+", "job": "x"}, {"user_fields.job": "is no field of the bundle's prompts, which hold age, sex"}),
        ({"sex": "x", "job": "x"}, {"user_fields.age": "is missing", "user_fields.sex": "must be", "user_fields.job": "is no"}),
        ({"age": "a" * 257}, {"user_fields": "has 257 bytes"}),
        ({str(number): "x" for number in range(65)}, {"user_fields": "has 65 fields, at most 64"}),
    ],
)  # fmt: skip
def test_fields_that_do_not_fit_are_named(
    fields: dict[str, str], violations: dict[str, str], made: MadeCheckpoint, client: Client
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.recommend(made.users[0], user_fields=fields)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    for field, problem in violations.items():
        assert f"{field}: {problem}" in error.details()


def test_the_service_names_its_fields(client: Client) -> None:
    age, sex = client.info().user_fields
    assert (age.name, list(age.values), age.HasField("default_value")) == ("age", AGES, False)
    assert (sex.name, list(sex.values), sex.default_value) == ("sex", SEXES, "F")


def test_a_value_is_the_users_and_is_erased(client: Client, made: MadeCheckpoint, bundle: Path, redis_url: str) -> None:
    """Blocks before the first value are shared by all users. That of a value, and all behind it, go with the user."""
    history, user = made.users[5], {"age": "25-34", "sex": "M"}
    prompt = len(users_tokens(made, history, user))
    template = Bundle(bundle).manifest.target.prompt
    shared = len(template.shared_prefix) // 4 * 4
    assert 0 < shared < len(template.prefix)
    with redis.Redis.from_url(redis_url) as store:
        for leaver in (f"leaver-{number}" for number in range(20)):
            # A cache may lose any write, and nobody writes the same blocks twice: then another user asks.
            client.record(leaver, history)
            first = client.recommend(user_id=leaver, user_fields=user)
            name = user_blocks_name(user_cache_key("", leaver))
            if came(partial(store.exists, name)):
                break
        again = client.recommend(user_id=leaver, user_fields=user)
        assert_same_list(again, first)
        assert sum(again.statistics.cached_tokens.values()) == (prompt - 1) // 4 * 4
        other = client.recommend(user_id=leaver, user_fields=user | {"age": "56+"})
        assert sum(other.statistics.cached_tokens.values()) == shared
        client.stub.ForgetUser(pb.ForgetUserRequest(user_id=leaver), timeout=LIVENESS_SECONDS)
        assert store.exists(name) == 0
        client.record(leaver, history)
        until(
            lambda: sum(client.recommend(user_id=leaver, user_fields=user).statistics.cached_tokens.values()) == shared
        )


def test_fields_stand_on_the_command_line(stack: LocalStack, made: MadeCheckpoint) -> None:
    history = ",".join(made.users[3])
    asked = ("recommend", "--history", history, "-k", 3, "--address", stack.address)
    done = run(*asked, "--field", "age=56+", "--field", "sex=M")
    assert done.exit_code == 0, done.output
    assert "user_fields.age: is missing" in one_line(run(*asked), 2)
    for wrong in ("age", "=5", "age="):
        done = run(*asked, "--field", wrong)
        assert done.exit_code == 2
        assert "is not NAME=VALUE" in re.sub(r"\W*\n\W*", " ", done.stderr)


def test_parity_reads_the_users_own_text(made: MadeCheckpoint, bundle: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "parity.json", made.folder.parent
    asked = (
        "bench",
        "parity",
        "--bundle",
        bundle,
        "--checkpoint",
        made.folder,
        "--histories",
        made.histories,
        "--users",
        8,
    )
    own = ("--prompt", folder / "prompt.txt", "--max-items", 10, "--index", made.index)
    done = run(*asked, *own, "-k", 5, "--json", out)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert {row["prompts_different"] for row in rows} == {0}
    (folder / "other.txt").write_text(PROMPT.replace("age {age}", "age: {age}"))
    assert "8 of 8 prompts are not the bundle's" in one_line(
        run(*asked, "--prompt", folder / "other.txt", "--max-items", 10, "-k", 5)
    )
    (folder / "other.txt").write_text(PROMPT.replace("{sex}", "{job}"))
    line = one_line(run(*asked, "--prompt", folder / "other.txt"))
    assert "{job} is no field of users in the prompts of" in line


def test_a_batch_gives_each_user_its_values(bundle: Path, made: MadeCheckpoint, tmp_path: Path) -> None:
    users = [
        {"user_id": str(number), "history": made.users[0], "user_fields": {"age": age}}
        for number, age in enumerate(AGES)
    ]
    (tmp_path / "users.jsonl").write_text(
        "\n".join(map(json.dumps, [*users, {"user_id": "x", "history": made.users[0]}]))
    )
    done = run(
        "batch", tmp_path / "users.jsonl", "--out", tmp_path / "lists", "--bundle", bundle, "--format", "jsonl", "-k", 5
    )
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "lists").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == 4, done.output
    assert len({tuple(line["scores"]) for line in lines[:3]}) == 3
    assert "user_fields.age: is missing" in json.dumps(lines[3])
