"""Recommend and RecommendBatch as a client meets them: what is refused and how, which history counts, batches, deadlines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import read_manifest, write_manifest
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import random_history
from tests.integration.conftest import LIMITS
from tests.serving import (
    LEVELS,
    LIVENESS_SECONDS,
    MODES,
    PLAIN,
    RECOMMENDATION,
    SAMPLING,
    WINDOW,
    Client,
    assert_same_list,
    ids,
    refused,
    request_of,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
LONG = "x" * 257
NAN = math.nan


@pytest.fixture(scope="module")
def lenient(
    bundle: Path, shared_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory, log_folder: Path
) -> Iterator[Client]:
    """An orchestrator whose bundle allows an empty history, before the same models."""
    root = tmp_path_factory.mktemp("lenient")
    (root / "catalogue").symlink_to(bundle / "catalogue")
    write_manifest(root, read_manifest(bundle).model_copy(update={"allow_empty_history": True}))
    flags = shared_stack.orchestrators[0].flags | {"bundle": root}
    service = ServiceProcess("orchestrator", flags, log_folder / "lenient.log")
    service.start()
    with Client(service.address) as client:
        yield client
    service.stop()


def numbered(count: int) -> list[str]:
    return [f"unknown-{n}" for n in range(count)]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("k", {"k": 0}),
    ("k", {"k": LIMITS["max-k"] + 1}),
    ("k", {"k": 2**31 - 1}),
    ("k", {"k": -1}),
    ("beam_width", {"beam_width": -1}),
    ("least_beam_width", {"least_beam_width": -1}),
    ("items_per_path", {"items_per_path": -1}),
    *[("seed", {"mode": mode, "seed": -1}) for mode in SAMPLING],
    ("beam_width", {"k": 5, "beam_width": 4}),
    ("least_beam_width", {"k": 5, "beam_width": 9, "least_beam_width": 4}),
    ("least_beam_width", {"k": 5, "beam_width": 9, "least_beam_width": 10}),
    ("beam_widths", {"beam_width": 9, "beam_widths": [9]}),
    ("beam_widths", {"beam_widths": [6, 7, 8, 9, 10]}),
    ("beam_widths", {"beam_widths": [6] * 65}),
    ("beam_widths[1]", {"beam_widths": [9, 0, 9]}),
    ("beam_widths[2]", {"k": 5, "beam_widths": [9, 9, 4]}),
    ("beam_widths[0]", {"beam_widths": [LIMITS["max-beam-width"] + 1, 9]}),
    ("beam_widths[0]", {"k": 5, "beam_widths": [4, 9], "mode": pb.MODE_EXACT_SAMPLING}),
    ("least_beam_width", {"k": 5, "beam_widths": [2, 9, 7], "least_beam_width": 10}),
    ("least_beam_width", {"k": 5, "beam_widths": [2, 9, 7], "least_beam_width": 4}),
    ("priority", {"priority": 9}),
    ("beam_width", {"beam_width": LIMITS["max-beam-width"] + 1}),
    ("mode", {"mode": 6}),
    ("mode", {"mode": -1}),
    ("tolerance", {"mode": pb.MODE_TOLERANCE, "tolerance": -0.1}),
    ("tolerance", {"mode": pb.MODE_TOLERANCE, "tolerance": NAN}),
    ("tolerance", {"mode": pb.MODE_TOLERANCE, "tolerance": math.inf}),
    *[("tolerance", {"mode": mode, "tolerance": 0.1}) for mode in MODES if mode != pb.MODE_TOLERANCE],
    *[("temperature", {"mode": mode, "temperature": value}) for mode in SAMPLING for value in (0.0, -1.0, NAN, 1e9)],
    *[("temperature", {"mode": mode, "temperature": 1.0}) for mode in PLAIN],
    ("temperature", {"temperature": 1.0}),
    *[("seed", {"mode": mode, "seed": 0}) for mode in PLAIN],
    ("excluded_item_ids", {"excluded_item_ids": numbered(LIMITS["max-candidate-items"] + 1)}),
    ("allowed_item_ids", {"allowed_item_ids": numbered(LIMITS["max-candidate-items"] + 1)}),
    ("excluded_item_ids[1]", {"excluded_item_ids": ["item-1", LONG]}),
    ("allowed_item_ids[1]", {"allowed_item_ids": ["item-1", LONG]}),
    ("allowed_item_ids[0]", {"allowed_item_ids": [""]}),
    ("tenant", {"tenant": LONG}),
    ("tenant", {"tenant": "é" * 129}),
]
SUBJECTS: list[tuple[grpc.StatusCode, str, dict[str, Any]]] = [
    (INVALID, "subject", {}),
    (INVALID, "history", {"history": pb.History()}),
    (INVALID, "history", {"history": pb.History(item_ids=["nobody-knows", "this-either"])}),
    (INVALID, "history", {"history": pb.History(item_ids=["item-1"] * (LIMITS["max-history-items"] + 1))}),
    (INVALID, "history[1]", {"history": pb.History(item_ids=["item-1", LONG])}),
    (INVALID, "history[0]", {"history": pb.History(item_ids=["", "item-1"])}),
    (INVALID, "user_id", {"user_id": ""}),
    (INVALID, "user_id", {"user_id": LONG}),
    (grpc.StatusCode.NOT_FOUND, "user_id", {"user_id": "nobody"}),
]


def status_of(refusal: Any) -> status_pb2.Status:
    """The status with its details, out of the trailers."""
    trailers: dict[str, Any] = dict(refusal.trailing_metadata())
    return status_pb2.Status.FromString(trailers["grpc-status-details-bin"])


def reasons(status: status_pb2.Status) -> tuple[str, list[str]]:
    """The reason in the details of a status, and the fields at fault."""
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for message in (info, request):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    assert info.domain == "atspeed"
    return info.reason, [violation.field for violation in request.field_violations]


class TestRefused:
    """Every refusal names its field, and the call after it is served."""

    def test_all_violations_are_named_at_once(self, client: Client) -> None:
        """In the details, each with its field, and in the message."""
        request = pb.RecommendRequest(
            k=0,
            mode=pb.MODE_TOLERANCE,
            tolerance=-1,
            seed=3,
            priority=cast("Any", 9),
            items_per_path=-1,
            excluded_item_ids=["", "a", LONG],
            tenant=LONG,
        )
        with pytest.raises(grpc.RpcError) as refusal:
            client.stub.Recommend(request, timeout=LIVENESS_SECONDS)
        status = status_of(refusal.value)
        reason, fields = reasons(status)
        assert reason == "INVALID_REQUEST"
        ids_at_fault = ["excluded_item_ids[0]", "excluded_item_ids[2]"]
        expected = ["k", "tolerance", "seed", "priority", "items_per_path", *ids_at_fault, "tenant", "subject"]
        assert sorted(fields) == sorted(expected)
        assert (status.code, status.message) == (INVALID.value[0], refusal.value.details())
        assert all(f"{field}: " in status.message for field in expected)

    def test_more_violations_than_a_trailer_holds_are_counted(self, client: Client) -> None:
        """Whatever they hold, the status arrives."""
        with pytest.raises(grpc.RpcError) as refusal:
            client.recommend(["item-1"], excluded_item_ids=["é" * 200] * LIMITS["max-candidate-items"])
        assert refusal.value.code() is INVALID
        status = status_of(refusal.value)
        request = error_details_pb2.BadRequest()
        status.details[1].Unpack(request)
        *named, rest = request.field_violations
        assert rest.field == ""
        assert rest.description == f"and {LIMITS['max-candidate-items'] - len(named)} more"
        assert len(named) > 10

    @pytest.mark.parametrize(("field", "fields"), REFUSED, ids=[f"{f}-{n}" for n, (f, _) in enumerate(REFUSED)])
    def test_a_bad_field(self, client: Client, history: list[str], field: str, fields: dict[str, Any]) -> None:
        with refused(INVALID, field):
            client.recommend(history, **fields)
        assert len(client.recommend(history).items) == 5

    @pytest.mark.parametrize(("code", "field", "subject"), SUBJECTS)
    def test_a_bad_subject(
        self, client: Client, history: list[str], code: grpc.StatusCode, field: str, subject: dict[str, Any]
    ) -> None:
        with refused(code, field):
            client.recommend(**subject)
        assert len(client.recommend(history).items) == 5

    def test_a_stored_history_of_unknown_items_only(self, client: Client, history: list[str]) -> None:
        client.record("user", ["nobody-knows", "this-either"])
        with refused(INVALID, "user_id"):
            client.recommend(user_id="user")
        client.record("user", history)
        assert len(client.recommend(user_id="user").items) == 5

    def test_a_message_beyond_the_limit(self, client: Client, history: list[str]) -> None:
        """The transport itself refuses it, so no field is named."""
        with pytest.raises(grpc.RpcError) as refusal:
            client.recommend(history, tenant="x" * 33_600_000)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(client.recommend(history).items) == 5

    @pytest.mark.parametrize("method", ["Recommend", "RecommendBatch", "RecordEvents", "GetHistory", "ForgetUser"])
    @pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff", b"\x1a\xff\xff\xff\xff\x0f"])
    def test_bytes_that_are_no_message(self, client: Client, history: list[str], method: str, data: bytes) -> None:
        """The answer is ours, without a word from the protobuf library."""
        path = f"/{RECOMMENDATION}/{method}"
        call: Any = client.channel.unary_stream if method == "RecommendBatch" else client.channel.unary_unary
        with pytest.raises(grpc.RpcError) as refusal:
            list(call(path)(data, timeout=LIVENESS_SECONDS))
        assert refusal.value.code() is INVALID
        assert refusal.value.details() == "request: not a valid message of this method"
        assert len(client.recommend(history).items) == 5

    def test_a_batch_that_is_too_large(self, client: Client, history: list[str]) -> None:
        with refused(INVALID, "requests"):
            client.batch([request_of(history)] * (LIMITS["max-batch"] + 1))
        assert len(client.batch([request_of(history)] * LIMITS["max-batch"])) == LIMITS["max-batch"]


class TestHistories:
    def test_unknown_items_are_skipped_and_listed(self, client: Client, history: list[str]) -> None:
        reply = client.recommend(["ghost", *history[:2], "phantom", *history[2:], "ghost"])
        assert list(reply.unknown_history_item_ids) == ["ghost", "phantom", "ghost"]
        assert reply.history_items_used == len(history)
        assert_same_list(reply, client.recommend(history))

    def test_only_the_window_counts(self, client: Client, catalogue: Catalogue) -> None:
        """A history longer than the window is served with its newest items: the list is the window's own."""
        long = random_history(catalogue, LIMITS["max-history-items"], seed=9)
        reply = client.recommend(long)
        assert reply.history_items_used == WINDOW
        assert reply.statistics.prompt_tokens == 2 + WINDOW * LEVELS
        assert_same_list(reply, client.recommend(long[-WINDOW:]))
        assert ids(reply) != ids(client.recommend(long[:WINDOW]))

    def test_a_short_history_is_used_whole(self, client: Client, history: list[str]) -> None:
        reply = client.recommend(history[:3])
        assert reply.history_items_used == 3
        assert reply.statistics.prompt_tokens == 2 + 3 * LEVELS

    def test_a_stored_history_gives_the_list_of_the_same_inline(self, client: Client, history: list[str]) -> None:
        client.record("user", history)
        assert_same_list(client.recommend(user_id="user"), client.recommend(history))

    def test_a_history_has_an_order(self, client: Client, history: list[str]) -> None:
        assert ids(client.recommend(history, k=10)) != ids(client.recommend(history[::-1], k=10))

    def test_without_any_where_the_bundle_allows_it(
        self, lenient: Client, client: Client, stack: LocalStack, history: list[str]
    ) -> None:
        """An unknown user, an empty history and one of unknown items only are then the same: an empty prompt."""
        assert lenient.info().allows_empty_history
        replies = [
            lenient.recommend(user_id="nobody"),
            lenient.recommend([]),
            lenient.recommend(["nobody-knows"]),
        ]
        assert [list(reply.unknown_history_item_ids) for reply in replies] == [[], [], ["nobody-knows"]]
        assert [reply.cold_start for reply in replies] == [
            pb.COLD_START_NO_STORED_HISTORY,
            pb.COLD_START_EMPTY_HISTORY,
            pb.COLD_START_UNKNOWN_ITEMS,
        ]
        for reply in replies:
            assert reply.history_items_used == 0
            assert reply.statistics.prompt_tokens == 2
            assert len(reply.items) == 5
            assert_same_list(reply, replies[0])
        assert_same_list(lenient.recommend(history), client.recommend(history))

    def test_a_stored_history_without_a_known_item_is_a_cold_start_until_one_is_recorded(self, lenient: Client) -> None:
        lenient.record("ghostly", ["ghost"])
        assert lenient.recommend(user_id="ghostly").cold_start == pb.COLD_START_UNKNOWN_ITEMS
        lenient.record("ghostly", ["item-1"])
        for reply in (lenient.recommend(user_id="ghostly"), lenient.recommend(["ghost", "item-1"])):
            assert reply.cold_start == pb.COLD_START_UNSPECIFIED
            assert reply.history_items_used == 1


class TestBatch:
    def test_every_request_gets_its_own_answer(self, client: Client, catalogue: Catalogue) -> None:
        histories = [random_history(catalogue, 1 + n % 8, seed=n) for n in range(LIMITS["max-batch"])]
        results = client.batch([request_of(history, k=1 + n) for n, history in enumerate(histories)])
        assert sorted(results) == list(range(len(histories)))
        for n, history in enumerate(histories):
            assert_same_list(results[n].response, client.recommend(history, k=1 + n))

    def test_one_failure_is_its_own(self, client: Client, history: list[str]) -> None:
        requests = [
            request_of(history),
            request_of(history, k=0),
            request_of(user_id="nobody"),
            pb.RecommendRequest(k=1),
            request_of(history),
        ]
        results = client.batch(requests)
        assert {index: result.WhichOneof("result") for index, result in results.items()} == {
            0: "response",
            1: "error",
            2: "error",
            3: "error",
            4: "response",
        }
        codes = {index: (results[index].error.code, results[index].error.message.split(":")[0]) for index in (1, 2, 3)}
        assert codes == {1: (3, "k"), 2: (5, "user_id"), 3: (3, "subject")}
        assert reasons(results[1].error) == ("INVALID_REQUEST", ["k"])
        assert reasons(results[2].error) == ("HISTORY_NOT_FOUND", ["user_id"])
        assert reasons(results[3].error) == ("INVALID_REQUEST", ["subject"])
        assert_same_list(results[0].response, results[4].response)

    def test_what_is_ready_does_not_wait(self, client: Client, catalogue: Catalogue, history: list[str]) -> None:
        """Requests that fail at once come back before an earlier one that has to be computed."""
        slow = request_of(random_history(catalogue, WINDOW, seed=77), k=50, beam_width=100)
        call = client.stub.RecommendBatch(
            pb.RecommendBatchRequest(requests=[slow, request_of(history, k=0)]), timeout=LIVENESS_SECONDS
        )
        assert [answer.index for answer in call] == [1, 0]

    def test_an_empty_batch_is_an_empty_answer(self, client: Client) -> None:
        assert client.batch([]) == {}


class TestDeadlines:
    @pytest.mark.parametrize("seconds", [0.0001, 0.001])
    def test_too_little_time_is_an_end_not_a_fault(self, client: Client, history: list[str], seconds: float) -> None:
        """The caller gets DEADLINE_EXCEEDED, and the next call is served."""
        for _ in range(10):
            with pytest.raises(grpc.RpcError) as late:
                client.recommend(history, timeout=seconds, k=50, beam_width=100)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(client.recommend(history).items) == 5

    def test_a_cancelled_call_leaves_nothing_behind(self, client: Client, catalogue: Catalogue) -> None:
        history = random_history(catalogue, 4, seed=78)
        calls = [client.stub.Recommend.future(request_of(history), timeout=LIVENESS_SECONDS) for _ in range(10)]
        for call in calls:
            call.cancel()
        assert len(client.recommend(history).items) == 5
