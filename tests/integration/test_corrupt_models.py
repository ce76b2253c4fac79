"""Models whose passes give no numbers where they read a certain token: no plan decides whether there is a list."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Role
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.rpc.channels import health_name
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import EOH, write_bundle
from tests.corrupt_models import CorruptCode, corrupt, next_in_line
from tests.oracles.models import Models
from tests.serving import (
    MODES,
    SAMPLING,
    SERVING,
    TARGET,
    WINDOW,
    Client,
    Link,
    assert_same_list,
    check_health,
    ids,
    models,
    request_of,
    until,
)

K = 4
NOT_SERVING = int(health_pb2.HealthCheckResponse.NOT_SERVING)
UNANSWERED, DRAFT_FAILED = pb.DEGRADED_REASON_PLAN_UNANSWERED, pb.DEGRADED_REASON_DRAFT_FAILED


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Models:
    """The models before they are corrupted."""
    return Models.load(write_bundle(tmp_path_factory.mktemp("whole"), catalogue, max_items=WINDOW))


@pytest.fixture(scope="module")
def corrupt_code(whole: Models) -> CorruptCode:
    return asyncio.run(next_in_line(whole, K, 2 * K))


def copy(whole: Models, folder: Path, role: Role, tokens: Sequence[int]) -> Path:
    shutil.copytree(whole.bundle.root, folder)
    corrupt(folder, role, tokens)
    return folder


@pytest.fixture(scope="module", params=["target", "draft"])
def role(request: pytest.FixtureRequest) -> Role:
    """Role of the corrupt model."""
    role: Role = request.param
    return role


@pytest.fixture(scope="module")
def corrupt_stack(
    role: Role, whole: Models, corrupt_code: CorruptCode, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalStack]:
    """One replica of each, which is asked once, and which one bad pass would make unhealthy."""
    bundle = copy(whole, tmp_path_factory.mktemp("corrupt") / "bundle", role, [corrupt_code.token])
    flags: dict[str, dict[str, object]] = {
        "target": {"threads": 1, "unhealthy-after": 1},
        "draft": {"threads": 1, "unhealthy-after": 1},
        "orchestrator": {
            "target-attempts": 1,
            "draft-timeout-seconds": 30,
            "draft-backoff-seconds": 0,
            "planner": "fixed",
            "shadow-share": 1,
            "shadow-concurrency": 16,
        },
    }
    with LocalStack(bundle, flags=flags) as stack:
        yield stack


@pytest.fixture(scope="module")
def speculating(corrupt_stack: LocalStack) -> Iterator[Client]:
    with Client(corrupt_stack.address) as client:
        yield client


@pytest.fixture(scope="module")
def alone(corrupt_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """An orchestrator before the same target that has nothing to plan with, and that keeps to itself what it caches."""
    flags = {name: value for name, value in corrupt_stack.orchestrators[0].flags.items() if name != "draft"}
    log = tmp_path_factory.mktemp("alone") / "log"
    service = ServiceProcess("orchestrator", {**flags, "target-prefetch": False, "shadow-share": 0}, log)
    with service, Client(service.address) as client:
        yield client


def answer(client: Client, history: Sequence[str], mode: pb.Mode.ValueType) -> pb.RecommendResponse | grpc.StatusCode:
    fields = {"seed": 7} if mode in SAMPLING else {}
    try:
        return client.recommend(history, k=K, beam_width=K, mode=mode, **fields)
    except grpc.RpcError as error:
        return error.code()


@pytest.mark.parametrize("mode", MODES, ids=pb.Mode.Name)
def test_a_list_in_every_mode_where_there_is_one_without_plans(
    speculating: Client, alone: Client, corrupt_code: CorruptCode, mode: pb.Mode.ValueType
) -> None:
    """The list, too. Speculation comes first: what its passes leave in a cache must not corrupt the others."""
    answered = 0
    for history in corrupt_code.histories:
        reply, expected = answer(speculating, history, mode), answer(alone, history, mode)
        if isinstance(expected, grpc.StatusCode):
            assert mode in SAMPLING  # which may draw the corrupt code itself: then no target has a list
            assert reply is expected
            continue
        assert isinstance(reply, pb.RecommendResponse), reply
        answered += 1
        assert_unharmed(reply, expected, mode)
    assert answered > len(corrupt_code.histories) / 2


def assert_unharmed(reply: pb.RecommendResponse, expected: pb.RecommendResponse, mode: pb.Mode.ValueType) -> None:
    """The list is the target's own, and a reply without a plan is degraded."""
    if mode != pb.MODE_RELAXED_SAMPLING or reply.degraded:
        assert_same_list(reply, expected)
    assert reply.degraded == bool(reply.degraded_reasons)
    assert set(reply.degraded_reasons) <= {UNANSWERED, DRAFT_FAILED}


def test_replies_name_the_failure_and_speculation_stays_on(
    role: Role, corrupt_stack: LocalStack, speculating: Client, corrupt_code: CorruptCode
) -> None:
    replies = [speculating.recommend(history, k=K, beam_width=K) for history in corrupt_code.histories]
    reasons = {reason for reply in replies for reason in reply.degraded_reasons}
    assert reasons == ({UNANSWERED} if role == "target" else {DRAFT_FAILED})
    checks = speculating.info().shadow_checks
    assert (checks.different, checks.speculation_off) == (0, False)
    version = Bundle(Path(str(corrupt_stack.targets[0].flags["bundle"]))).manifest.model_version("target")
    with models(corrupt_stack.targets[0].address) as channel:
        until(lambda: check_health(channel, health_name(TARGET, version)) == SERVING)
        assert check_health(channel, TARGET) == SERVING


def test_requests_that_share_passes_each_get_their_list(
    speculating: Client, alone: Client, corrupt_code: CorruptCode
) -> None:
    """A batch's requests run side by side, so that one's corrupt node is in a pass with the others' nodes."""
    expected = [alone.recommend(history, k=K, beam_width=K) for history in corrupt_code.histories]
    answers = speculating.batch([request_of(history, k=K, beam_width=K) for history in corrupt_code.histories[:16]])
    for index, one in answers.items():
        assert one.WhichOneof("result") == "response", one.error
        assert ids(one.response) == ids(expected[index])


def every_code(whole: Models, level: int) -> list[int]:
    """Tokens of a level."""
    trie, tokens = whole.catalogue.trie, whole.bundle.bundle.manifest.target.code_tokens
    start = int(trie.codebook_offset[level])
    return list(tokens[start : start + trie.codebook_sizes[level]])


@pytest.mark.parametrize("what", ["prompt", 0, 1, 2], ids=str)
def test_a_target_whose_plain_passes_give_no_numbers_is_unhealthy_from_the_start(
    whole: Models, tmp_path: Path, what: str | int
) -> None:
    """A token of every prompt, or all codes of a level: no list can be made. The service runs and reports it."""
    tokens = [EOH] if isinstance(what, str) else every_code(whole, what)
    bundle = copy(whole, tmp_path / "bundle", "target", tokens)
    version = Bundle(bundle).manifest.model_version("target")
    flags = {"bundle": bundle, "threads": 1, "warm-up-seconds": 0}
    with ServiceProcess("target_service", flags, tmp_path / "log") as service, models(service.address) as channel:
        assert check_health(channel, health_name(TARGET, version)) == NOT_SERVING
        assert check_health(channel, TARGET) == NOT_SERVING
        assert check_health(channel, "") == SERVING


def test_a_redis_that_has_seen_invalid_passes_keeps_none_of_them(
    whole: Models, corrupt_code: CorruptCode, tmp_path: Path, redis_server: LocalRedis, redis_url: str
) -> None:
    """The prompt's keys and values of a pass that had a corrupt node in it are no numbers either."""
    bundle = copy(whole, tmp_path / "bundle", "target", [corrupt_code.token])
    flags: dict[str, dict[str, object]] = {
        "target": {"threads": 1, "kv-redis": "always", "kv-block-tokens": 2, "kv-memory-mb": 0},
        "orchestrator": {"planner": "fixed", "draft-timeout-seconds": 30},
    }
    with LocalStack(bundle, redis_url=redis_server.url, flags=flags) as stack, Client(stack.address) as client:
        for _ in range(2):
            for history in corrupt_code.histories:
                client.recommend(history, k=K, beam_width=K)
                assert not client.recommend(history, k=K, beam_width=K, mode=pb.MODE_TARGET_ONLY).degraded


def test_a_plan_that_is_larger_than_the_target_takes_costs_no_list(
    whole: Models, corrupt_code: CorruptCode, tmp_path: Path
) -> None:
    flags: dict[str, dict[str, object]] = {
        "target": {"threads": 1, "max-nodes": 16},
        "orchestrator": {"planner": "fixed", "draft-timeout-seconds": 30, "target-attempts": 1},
    }
    with LocalStack(whole.bundle.root, log_folder=tmp_path, flags=flags) as stack, Client(stack.address) as client:
        for history in corrupt_code.histories[:3]:
            expected = client.recommend(history, k=K, beam_width=K, mode=pb.MODE_TARGET_ONLY)
            reply = client.recommend(history, k=K, beam_width=K)
            assert_same_list(reply, expected)
            assert reply.degraded_reasons == [UNANSWERED]


def test_a_bundle_whose_target_gives_no_numbers_is_never_swapped_to(
    whole: Models, corrupt_code: CorruptCode, tmp_path: Path
) -> None:
    """The orchestrator waits for a target that serves the version, and none does."""
    link = Link(tmp_path / "link", whole.bundle.bundle)
    broken = Bundle(copy(whole, tmp_path / "broken", "target", [EOH]))
    following: dict[str, object] = {"bundle-poll-seconds": 0.1}
    flags: dict[str, dict[str, object]] = {
        "target": {**following, "threads": 1, "warm-up-seconds": 0},
        "orchestrator": {**following, "bundle-settle-seconds": 0},
    }
    unfit = health_name(TARGET, broken.manifest.model_version("target"))
    with LocalStack(link.path, drafts=0, log_folder=tmp_path, flags=flags) as stack, Client(stack.address) as client:
        before = client.recommend(corrupt_code.histories[0])
        link.point_to(broken)
        with models(stack.targets[0].address) as channel:
            until(lambda: known(channel, unfit))
            assert check_health(channel, unfit) == NOT_SERVING
            assert check_health(channel, TARGET) == SERVING
        until(lambda: client.info().pending_bundle == broken.manifest.version)
        for history in corrupt_code.histories:
            assert client.recommend(history).versions == before.versions


def known(channel: grpc.Channel, service: str) -> bool:
    try:
        check_health(channel, service)
    except grpc.RpcError:
        return False
    return True
