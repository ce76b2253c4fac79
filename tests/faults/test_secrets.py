"""The text of an exception is in no status, trailer, standard output, log, span or metric."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from atspeed.v1 import draft_pb2, target_pb2
from atspeed.v1 import recommendation_pb2 as pb
from tests.faults.leaking import SECRET
from tests.observed import Collector, scrape_port
from tests.secured import path_of, rpcs
from tests.serving import LIVENESS_SECONDS, until

SERVICES = ("draft_service", "target_service", "orchestrator")
FAILING = {"draft_service": "Plan", "target_service": "Evaluate", "orchestrator": "Recommend"}
MESSAGES: Mapping[str, Any] = {
    "draft_service": draft_pb2.PlanRequest(),
    "target_service": target_pb2.EvaluateRequest(start=target_pb2.EvaluateStart()),
    "orchestrator": pb.RecommendRequest(user_id="u", k=1),
}


@contextmanager
def leaking(service: str, bundle: Path, folder: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """The service, its outputs in files of `folder`."""
    flags = ["--port=0", "--metrics-port=0", "--tracing", f"--bundle={bundle}", "--log-format=json"]
    if service == "orchestrator":
        flags += ["--target=127.0.0.1:1", "--draft=127.0.0.1:1"]
    command = [sys.executable, "-m", "tests.faults.leaking", *flags]
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "LEAKING": service, **variables})
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(LIVENESS_SECONDS)
        process.kill()
        process.wait()


def ports(process: subprocess.Popen[bytes], folder: Path) -> Mapping[str, int]:
    """Return `port` and `metrics_port` of the service, once it listens."""
    until(lambda: process.poll() is not None or (folder / "stdout").read_bytes().endswith(b"\n"))
    announced: Mapping[str, int] = json.loads((folder / "stdout").read_text())
    return announced


def failure(address: str, service: str) -> grpc.Call:
    """The status of a call that fails inside the service."""
    (method,) = [m for m in rpcs() if m.name == FAILING[service]]
    message = MESSAGES[service].SerializeToString()
    with grpc.insecure_channel(address) as channel:
        kind = channel.stream_stream if method.client_streaming else channel.unary_unary
        call: Any = kind(path_of(method))
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([message]) if method.client_streaming else message, timeout=LIVENESS_SECONDS))
    return cast("grpc.Call", caught.value)


@pytest.mark.parametrize("service", SERVICES)
def test_a_failure_says_where_and_not_what(service: str, bundle: Path, tmp_path: Path) -> None:
    with Collector() as collector:
        endpoint = f"http://127.0.0.1:{collector.port}"
        with leaking(service, bundle, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as process:
            open_ports = ports(process, tmp_path)
            status = failure(f"127.0.0.1:{open_ports['port']}", service)
            failed = {"method": FAILING[service], "code": "INTERNAL"}  # which is sent before it is counted
            until(lambda: scrape_port(open_ports["metrics_port"]).total("atspeed_calls_total", **failed) == 1)
            metrics = scrape_port(open_ports["metrics_port"])
    assert status.code() is grpc.StatusCode.INTERNAL
    assert FAILING[service] in {span.name for span in collector.spans}
    assert SECRET not in metrics.text + collector.raw.decode("utf-8", "replace")
    details, log = status.details() or "", (tmp_path / "stderr").read_text()
    assert SECRET not in f"{details}{status.initial_metadata()}{status.trailing_metadata()}"
    assert SECRET not in (tmp_path / "stdout").read_text() + log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    events = {line["event"]: line for line in lines}
    assert {"uncaught_exception_in_thread", "uncaught_exception_in_finalizer", "event_loop_failure"} <= set(events)
    internal = events["internal_error"]
    assert internal["error_id"] == details.removeprefix("internal error ")
    assert internal["exception"].endswith("ValueError")
    for event in (
        "internal_error",
        "uncaught_exception_in_thread",
        "uncaught_exception_in_finalizer",
        "event_loop_failure",
    ):
        assert ", in fail" in events[event]["exception"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_start_that_fails_keeps_quiet_too(service: str, bundle: Path, tmp_path: Path) -> None:
    with leaking(service, bundle, tmp_path, LEAKING_AT="start") as process:
        assert process.wait(LIVENESS_SECONDS) == 1
    log = (tmp_path / "stderr").read_text()
    assert SECRET not in log + (tmp_path / "stdout").read_text()
    assert '"event": "uncaught_exception"' in log
