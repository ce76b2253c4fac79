"""Targets that die, hang or serve another version: what one replica began, another finishes."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import grpc
import pytest

from atspeed.engine.bundle.manifest import Manifest, read_manifest, write_manifest
from atspeed.engine.search.scoring import ScoringRule
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import new_bundle
from tests.catalogues import new_catalogue
from tests.faults.conftest import Case, asking, assert_all_right
from tests.serving import Client, ids, recovered, resume, storm, suspend, until


def evaluations(target: ServiceProcess) -> int:
    """Streams that a replica has served, by its log."""
    return target.log.read_text().count('TargetService/Evaluate"')


def replica_of(client: Client, targets: list[ServiceProcess], case: Case) -> ServiceProcess:
    """The replica that serves a history now, by the replicas' logs."""
    before = [evaluations(target) for target in targets]
    recovered(client, case.history)
    until(lambda: sum(map(evaluations, targets)) > sum(before))
    return next(target for target, count in zip(targets, before, strict=True) if evaluations(target) > count)


def all_reached(client: Client, targets: list[ServiceProcess], cases: list[Case]) -> list[ServiceProcess]:
    """Return each case's replica, when the orchestrator sends streams to all replicas."""
    replicas: list[ServiceProcess] = []

    def all_serve() -> bool:
        replicas[:] = [replica_of(client, targets, case) for case in cases]
        return all(target in replicas for target in targets)

    until(all_serve)
    return replicas


class TestOneOfTwo:
    @pytest.mark.parametrize("mode", [pb.MODE_STRICT, pb.MODE_TARGET_ONLY])
    def test_killed_with_streams_open(
        self, stack: LocalStack, client: Client, cases: list[Case], mode: pb.Mode.ValueType
    ) -> None:
        """A replica that holds some of the streams is killed, two times; the other takes them up and no list changes."""
        for victim in stack.targets:
            replicas = all_reached(client, stack.targets, cases)
            suspend(victim)
            # The victim's requests are sent first: when the others have been answered, these wait for the replica that hangs.
            held = [case for case, replica in zip(cases, replicas, strict=True) if replica is victim]
            others = [case for case, replica in zip(cases, replicas, strict=True) if replica is not victim]
            with ThreadPoolExecutor(len(cases)) as pool:
                waiting, answered = (
                    [pool.submit(call) for call in asking(client, group, mode=mode)] for group in (held, others)
                )
                wait(answered)
                victim.kill()
                replies = [future.result() for future in [*waiting, *answered]]
            assert_all_right(replies, held + others)
            assert sum(reply.statistics.target_retries for reply in replies) > 0
            assert not any(reply.degraded for reply in replies)
            victim.start()

    def test_killed_again_and_again_while_requests_run(
        self, stack: LocalStack, client: Client, cases: list[Case]
    ) -> None:
        """The replicas are killed in turn, four times in all, during a run: every request is answered with its list."""
        all_reached(client, stack.targets, cases)
        one, other = stack.targets

        def replaced(victim: ServiceProcess) -> Callable[[], None]:
            def replace() -> None:
                victim.kill()
                victim.start()
                all_reached(client, stack.targets, cases)

            return replace

        calls = asking(client, cases * 6)
        replies = storm(calls, {10: replaced(one), 20: replaced(other), 30: replaced(one), 40: replaced(other)})
        assert_all_right(replies, cases * 6)

    def test_hanging(self, stack: LocalStack, client: Client, cases: list[Case]) -> None:
        """The connections stay open without any reply: the other replica takes the streams up, and soon gets all calls."""
        all_reached(client, stack.targets, cases)
        suspend(stack.targets[0])
        replies = storm(asking(client, cases), {}, concurrency=len(cases))
        assert_all_right(replies, cases)
        assert sum(reply.statistics.target_retries for reply in replies) > 0
        until(lambda: not any(call().statistics.target_retries for call in asking(client, cases)))
        resume(stack.targets[0])
        all_reached(client, stack.targets, cases)

    @pytest.mark.parametrize("mode", [pb.MODE_RELAXED_SAMPLING, pb.MODE_EXACT_SAMPLING])
    def test_a_sample_survives_its_replica(
        self, stack: LocalStack, client: Client, cases: list[Case], mode: pb.Mode.ValueType
    ) -> None:
        """The noise is a function of the seed, so another replica draws the same sample.

        A relaxed sample also depends on what was drafted, so it may differ where a draft was late.
        """
        all_reached(client, stack.targets, cases)
        before = [call() for call in asking(client, cases[:6], mode=mode, seed=3)]
        replies = storm(asking(client, cases[:6], mode=mode, seed=3), {1: stack.targets[0].kill})
        pairs = list(zip(replies, before, strict=True))
        if mode == pb.MODE_RELAXED_SAMPLING:
            pairs = [pair for pair in pairs if not any(reply.degraded for reply in pair)]
        assert len(pairs) >= len(before) / 2
        assert [ids(reply) for reply, _ in pairs] == [ids(reply) for _, reply in pairs]

    def test_drained(self, stack: LocalStack, client: Client, cases: list[Case]) -> None:
        """A replica that is stopped in order loses no stream, so nothing has to be repeated."""
        all_reached(client, stack.targets, cases)
        replies = storm(asking(client, cases * 2), {8: stack.targets[0].stop})
        assert_all_right(replies, cases * 2)


class TestAll:
    def test_killed(self, stack: LocalStack, client: Client, cases: list[Case]) -> None:
        """UNAVAILABLE long before the deadline, for every caller; and lists again when they are back."""
        for target in stack.targets:
            target.kill()
        with ThreadPoolExecutor(4) as pool:
            failures = [pool.submit(call).exception() for call in asking(client, cases[:8])]
        assert {failure.code() for failure in failures if isinstance(failure, grpc.RpcError)} == {
            grpc.StatusCode.UNAVAILABLE
        }
        assert len(failures) == 8
        assert {backend.name: backend.available for backend in client.info().backends}["target"] is False
        for target in stack.targets:
            target.start()
        recovered(client, cases[0].history)
        assert_all_right(storm(asking(client, cases), {}), cases)

    def test_killed_with_streams_open(self, stack: LocalStack, client: Client, cases: list[Case]) -> None:
        """Requests whose replicas die under them end, each with an answer or with UNAVAILABLE."""
        all_reached(client, stack.targets, cases)
        for target in stack.targets:
            suspend(target)
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(call) for call in asking(client, cases[:8])]
            assert not wait(futures, 0.5, FIRST_COMPLETED).done
            for target in stack.targets:
                target.kill()
            failures = [future.exception() for future in futures]
        assert {failure.code() for failure in failures if isinstance(failure, grpc.RpcError)} == {
            grpc.StatusCode.UNAVAILABLE
        }

    def test_hanging(self, stack: LocalStack, client: Client, cases: list[Case]) -> None:
        """The caller's deadline holds, and requests are served again as soon as the replicas go on."""
        all_reached(client, stack.targets, cases)
        for target in stack.targets:
            suspend(target)
        with pytest.raises(grpc.RpcError) as late:
            client.recommend(cases[0].history, timeout=1)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        for target in stack.targets:
            resume(target)
        assert_all_right(storm(asking(client, cases[:8]), {}), cases[:8])


def other_rule(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"scoring_rule": ScoringRule.TRIE})


def other_code_tokens(manifest: Manifest) -> Manifest:
    tokens = tuple(reversed(manifest.target.code_tokens))
    return manifest.model_copy(update={"target": manifest.target.model_copy(update={"code_tokens": tokens})})


@pytest.fixture(scope="module", params=[None, other_rule, other_code_tokens], ids=["catalogue", "rule", "code tokens"])
def other_version(
    request: pytest.FixtureRequest,
    shared_stack: LocalStack,
    bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
    log_folder: Path,
) -> Iterator[ServiceProcess]:
    """A target that serves another catalogue, or the same weights in a way that gives other scores."""
    folder = tmp_path_factory.mktemp("other_version")
    if request.param is None:
        new_bundle(folder, new_catalogue(seed=99))
    else:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        write_manifest(folder, request.param(read_manifest(folder)))
    service = ServiceProcess(
        "target_service", shared_stack.targets[0].flags | {"bundle": folder}, log_folder / "other_version.log"
    )
    service.start()
    yield service
    service.stop()


@pytest.fixture
def mixed(stack: LocalStack, other_version: ServiceProcess, log_folder: Path) -> Iterator[Client]:
    """An orchestrator that finds the right replica and the other one."""
    flags = stack.orchestrators[0].flags | {"target": f"{stack.targets[0].address},{other_version.address}"}
    service = ServiceProcess("orchestrator", flags, log_folder / "mixed.log")
    service.start()
    with Client(service.address) as client:
        yield client
    service.stop()


class TestAnotherVersion:
    """A replica that serves another version, as in the middle of a rollout, beside one that serves the right one."""

    def test_the_right_replica_serves(self, mixed: Client, cases: list[Case]) -> None:
        """Calls are balanced by the health of the version, so no call reaches a replica of another version."""
        replies = [call() for call in asking(mixed, cases)]
        assert_all_right(replies, cases)
        assert sum(reply.statistics.target_retries for reply in replies) == 0

    def test_the_right_replica_serves_many_at_once(self, mixed: Client, cases: list[Case]) -> None:
        """The same holds for many requests on one channel, where retries alone would reach such a replica now and then."""
        assert_all_right(storm(asking(mixed, cases * 4), {}, concurrency=8), cases * 4)

    def test_when_no_replica_serves_the_version(
        self, stack: LocalStack, mixed: Client, cases: list[Case], other_version: ServiceProcess
    ) -> None:
        """Without the right replica calls are refused, and no other list is returned; they are served again when it is back."""
        recovered(mixed, cases[0].history)
        stack.targets[0].kill()
        for case in itertools.islice(cases, 4):
            with pytest.raises(grpc.RpcError) as refusal:
                mixed.recommend(case.history)
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        stack.targets[0].start()
        until(lambda: self.served(mixed, cases[0]))

    def served(self, client: Client, case: Case) -> bool:
        try:
            reply = client.recommend(case.history, k=20)
        except grpc.RpcError:
            return False
        assert_all_right([reply], [case])
        return True
