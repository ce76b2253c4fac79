"""`atspeed consume-events` at a service with TLS and tokens: other tenants' messages, and a token that expires and is renewed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atspeed.local.certificates import LocalCertificates
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from atspeed.rpc.healthcheck import state
from atspeed.v1 import recommendation_pb2 as pb
from tests.command_line import ROOT
from tests.conftest import mended
from tests.kafka import Kafka
from tests.secured import bearer, channel, secured_stack, write_tokens
from tests.serving import LIVENESS_SECONDS

TOKENS = {
    "acme": 'scopes = ["read", "write"]\ntenants = ["acme"]',
    "expired": 'scopes = ["read", "write"]\nexpires = 2020-01-01T00:00:00Z',
    "reader": 'scopes = ["read"]',
    "all": 'scopes = ["read", "write"]',
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> LocalCertificates:
    return LocalCertificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secured(
    bundle: Path, certificates: LocalCertificates, redis_server: LocalRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalStack]:
    folder = tmp_path_factory.mktemp("secured")
    write_tokens(folder / "public.toml", TOKENS)
    with secured_stack(bundle, certificates, folder, redis_url=mended(redis_server)) as stack:
        yield stack


class Consumer:
    """The command as a process, with a token in a file that can be replaced."""

    def __init__(self, kafka: Kafka, address: str, certificates: LocalCertificates, folder: Path) -> None:
        self._kafka, self._token = kafka, folder / "token"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.health = f"127.0.0.1:{listener.getsockname()[1]}"
        own = certificates.folder / "orchestrator"
        self._command = [sys.executable, "-m", "atspeed.cli", "consume-events", "--brokers", kafka.address]
        self._command += [
            "--topic",
            "secured",
            "--group",
            "secured",
            "--health",
            self.health,
            "--batch-messages",
            "20",
            "--timeout",
            "60",
        ]
        self._command += ["--address", address, "--ca", str(certificates.ca), "--token-file", str(self._token)]
        self._command += ["--certificate", f"{own}/tls.crt", "--key", f"{own}/tls.key"]

    def show(self, name: str) -> None:
        """Replace the token in one step, as a kubelet does."""
        new = self._token.with_suffix(".new")
        new.write_text(f"hush-{name}\n")
        new.replace(self._token)

    def __enter__(self) -> Consumer:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ATSPEED_")}
        self.process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 2 * LIVENESS_SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise AssertionError(self.process.communicate()[0])
            time.sleep(0.05)

    def committed(self) -> int:
        return self._kafka.committed("secured")


def message(tenant: str, user: str, item: str) -> tuple[str, bytes]:
    return user, json.dumps({"tenant": tenant, "user_id": user, "events": [{"item_id": item}]}).encode()


def test_other_tenants_are_dead_letters_and_a_token_without_rights_is_waited_for(
    secured: LocalStack, certificates: LocalCertificates, tmp_path: Path
) -> None:
    kafka = Kafka()
    foreign = [message("other", f"u{n}", "1") for n in range(3)]
    kafka.send("secured", *(message("acme", f"u{n}", "1") for n in range(30)), *foreign, message("acme", "u0", "2"))
    consumer = Consumer(kafka, secured.address, certificates, tmp_path)
    consumer.show("acme")
    sent = 34
    with consumer:
        consumer.until(lambda: consumer.committed() == sent)
        for refused in ("expired", "reader"):
            consumer.until(lambda: state(consumer.health) == "SERVING")
            consumer.show(refused)
            kafka.send("secured", message("acme", "u0", refused))
            consumer.until(lambda: state(consumer.health) == "NOT_SERVING")
            assert consumer.committed() == sent
            sent += 1
            consumer.show("acme")
            consumer.until(lambda: consumer.committed() == sent)  # noqa: B023
        consumer.process.send_signal(signal.SIGTERM)
        output, _ = consumer.process.communicate(timeout=LIVENESS_SECONDS)
        assert consumer.process.returncode == 0, output
    assert "hush-" not in output
    for reason in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        assert f'"{reason}' in output
    letters = kafka.read("secured.dead-letters", 3)
    assert sorted(letter.value() for letter in letters) == sorted(content for _, content in foreign)
    reasons = {dict(letter.headers())["atspeed-error"] for letter in letters}
    assert reasons == {b"tenant: the token is bound to others"}
    with channel(secured.address, certificates.client()) as on:
        history: Any = on.unary_unary(
            "/atspeed.v1.RecommendationService/GetHistory",
            request_serializer=pb.GetHistoryRequest.SerializeToString,
            response_deserializer=pb.GetHistoryResponse.FromString,
        )

        def stored(tenant: str) -> list[str]:
            asked = pb.GetHistoryRequest(user_id="u0", tenant=tenant)
            reply = history(asked, metadata=bearer("all"), timeout=LIVENESS_SECONDS)
            return [event.item_id for event in reply.events]

        assert stored("acme") == ["1", "2", "expired", "reader"]
        assert stored("other") == []
