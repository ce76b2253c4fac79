"""The services as processes: what they are, health under load, and the end of a process."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import draft_pb2, recommendation_pb2, target_pb2, types_pb2
from tests.bundles import new_bundle, random_history
from tests.catalogues import new_catalogue
from tests.messages import array, first_message, next_message
from tests.serving import (
    DRAFT,
    LEVELS,
    LIVENESS_SECONDS,
    RECOMMENDATION,
    TARGET,
    WINDOW,
    Client,
    EvaluateStream,
    FakeDraft,
    HealthWatch,
    assert_same_list,
    check_health,
    draft_stub,
    empty_plan,
    models,
    target_stub,
    until,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def version(bundle: Path) -> str:
    """The target's model."""
    return Bundle(bundle).manifest.model_version("target")


class TestHealth:
    def test_every_service_says_that_it_serves(self, stack: LocalStack) -> None:
        names = {"draft_service": DRAFT, "target_service": TARGET, "orchestrator": RECOMMENDATION}
        for service in stack.services:
            with models(service.address) as channel:
                for name in ("", names[service.module]):
                    assert check_health(channel, name) == SERVING

    def test_health_answers_while_the_model_computes(
        self, owned: ExitStack, tmp_path_factory: pytest.TempPathFactory, log_folder: Path
    ) -> None:
        """Several probes, one after the other, are answered before a long pass that was asked for first."""
        catalogue = new_catalogue(seed=3, items=3000)
        bundle = new_bundle(tmp_path_factory.mktemp("large"), catalogue)
        flags = {"bundle": bundle, "threads": 1}
        service = ServiceProcess("target_service", flags, log_folder / "busy.log")
        owned.callback(service.kill)
        service.start()
        nodes = list(range(min(4096, int(catalogue.trie.level_start[LEVELS]))))
        long = first_message(Bundle(bundle).manifest.model_version("target"), nodes)
        long.start.prompt.CopyFrom(array([3] * 250, "int64"))
        with models(service.address) as channel, ThreadPoolExecutor(1) as pool, EvaluateStream(channel) as stream:
            check_health(channel, TARGET)
            stream.send(long)
            answer = pool.submit(stream.receive)
            probes = 0
            while not answer.done():
                assert check_health(channel, TARGET) == SERVING
                probes += not answer.done()
            assert answer.result(LIVENESS_SECONDS).statistics.new_tokens == 250 + len(nodes) - 1
        service.stop()
        assert probes >= 5


class TestEnd:
    """SIGTERM: no new calls, running ones are answered, and the process ends with 0."""

    def test_a_target_finishes_its_streams(
        self, owned: ExitStack, bundle: Path, version: str, log_folder: Path
    ) -> None:
        service = ServiceProcess("target_service", {"bundle": bundle, "threads": 1}, log_folder / "ending.log")
        owned.callback(service.kill)
        service.start()
        process = service.process
        assert process is not None
        with (
            models(service.address) as channel,
            HealthWatch(service.address, TARGET) as watch,
            EvaluateStream(channel) as stream,
        ):
            stream.ask(first_message(version))
            assert watch.next() == SERVING
            process.send_signal(signal.SIGTERM)
            assert watch.next() == NOT_SERVING
            assert stream.ask(next_message([1])).evaluation.node.shape == [1]
            assert stream.end() == []
            assert process.wait(LIVENESS_SECONDS) == 0
        service.stop()

    def test_an_orchestrator_answers_what_it_has_begun(
        self, owned: ExitStack, stack: LocalStack, client: Client, catalogue: Catalogue, log_folder: Path
    ) -> None:
        """Calls that wait for their plan at the signal get their lists. Later calls find no server."""
        histories = [random_history(catalogue, WINDOW, seed=seed) for seed in range(3)]
        expected = [client.recommend(history) for history in histories]
        release = threading.Event()

        def slow(request: draft_pb2.PlanRequest, context: grpc.ServicerContext) -> bytes:
            release.wait(LIVENESS_SECONDS)
            return empty_plan(request, context)

        with FakeDraft() as draft, ThreadPoolExecutor(len(histories)) as pool:
            draft.answer = slow
            flags = stack.orchestrators[0].flags | {"draft": draft.address, "draft-timeout-seconds": 60}
            service = ServiceProcess("orchestrator", flags, log_folder / "ending-orchestrator.log")
            owned.callback(service.kill)
            service.start()
            process = service.process
            assert process is not None
            with Client(service.address) as ending, HealthWatch(service.address, RECOMMENDATION) as watch:
                calls = [pool.submit(ending.recommend, history) for history in histories]
                assert all(draft.asked.acquire(timeout=LIVENESS_SECONDS) for _ in histories)
                assert watch.next() == SERVING
                process.send_signal(signal.SIGTERM)
                assert watch.next() == NOT_SERVING
                with Client(service.address) as late:
                    until(lambda: self.is_gone(late))
                assert not any(call.done() for call in calls)
                release.set()
                for call, reply in zip(calls, expected, strict=True):
                    assert_same_list(call.result(), reply)
                assert process.wait(LIVENESS_SECONDS) == 0
            service.stop()

    def test_calls_that_do_not_end_are_cut_off(
        self, owned: ExitStack, bundle: Path, version: str, log_folder: Path
    ) -> None:
        """A client that never ends its stream cannot keep the process alive beyond the grace that it was given."""
        flags = {"bundle": bundle, "threads": 1, "drain-seconds": 0.2}
        service = ServiceProcess("target_service", flags, log_folder / "cut-off.log")
        owned.callback(service.kill)
        service.start()
        process = service.process
        assert process is not None
        with models(service.address) as channel, EvaluateStream(channel) as stream:
            stream.ask(first_message(version))
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIVENESS_SECONDS) == 0
            with pytest.raises(grpc.RpcError) as end:
                stream.receive()
            assert end.value.code() in {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
        service.stop()

    def is_gone(self, client: Client) -> bool:
        """Return true if new calls are refused."""
        try:
            client.stub.GetHistory(recommendation_pb2.GetHistoryRequest(user_id="user"), timeout=LIVENESS_SECONDS)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAVAILABLE
        return False


def test_a_busy_target_is_not_the_callers_fault(
    bundle: Path, version: str, catalogue: Catalogue, client: Client, tmp_path: Path
) -> None:
    """A target that serves as many calls as it may sends the orchestrator away; the caller may come again."""
    flags = {"target": {"max-running": 1, "max-queued": 0, "threads": 1}}
    with (
        LocalStack(bundle, drafts=0, log_folder=tmp_path, flags=flags) as busy,
        models(busy.targets[0].address) as channel,
        Client(busy.address) as caller,
        EvaluateStream(channel) as stream,
    ):
        history = random_history(catalogue, 5, seed=1)
        stream.ask(first_message(version))
        with pytest.raises(grpc.RpcError) as refusal:
            caller.recommend(history)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        stream.end()
        assert_same_list(caller.recommend(history), client.recommend(history))


def test_model_info_is_what_the_bundle_says(stack: LocalStack, bundle: Path, catalogue: Catalogue) -> None:
    manifest = Bundle(bundle).manifest
    target_request = target_pb2.TargetServiceGetModelInfoRequest()
    draft_request = draft_pb2.DraftServiceGetModelInfoRequest()
    with models(stack.targets[0].address) as target, models(stack.drafts[0].address) as draft:
        target_reply = target_stub(target).GetModelInfo(target_request, timeout=LIVENESS_SECONDS)
        draft_reply = draft_stub(draft).GetModelInfo(draft_request, timeout=LIVENESS_SECONDS)
    answers = {
        manifest.model_version("target"): target_reply.model,
        manifest.model_version("draft"): draft_reply.model,
    }
    for version, model in answers.items():
        assert model.model_version == version
        assert model.catalogue_version == catalogue.version
        assert (model.architecture, model.precision, model.provider) == ("llama", "float32", "cpu")
        assert model.scoring_rule == types_pb2.SCORING_RULE_VOCAB
        assert model.max_positions == 256
