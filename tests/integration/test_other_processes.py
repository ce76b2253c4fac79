"""Other processes: hashes agree between them, a start loads nothing superfluous, a bad address ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import redis
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from atspeed.engine.kv.memory_cache import KvLayout, block_keys, namespace
from atspeed.engine.search.sampling import Stream, uniform
from atspeed.observability import tracing

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=2, dtype="float32", block_tokens=2)


def test_serving_without_tracing_loads_none_of_its_packages() -> None:
    services = "orchestrator.server, target_service.server, draft_service.server"
    code = f"import sys, {services}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())  # redis-py itself looks whether there is OpenTelemetry, for its metrics
    assert "atspeed.observability.tracing" in loaded
    assert not any(name.startswith(("opentelemetry.exporter", "opentelemetry.instrumentation")) for name in loaded)
    assert "atspeed.observability.otel" not in loaded


def test_spans_of_redis_too_carry_the_type_of_an_exception_alone(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package that makes them records the exception, and Redis's errors quote what was sent."""
    kept = InMemorySpanExporter()
    monkeypatch.setattr("atspeed.observability.otel.OTLPSpanExporter", lambda: kept)
    fails = ("return redis.error_reply(ARGV[1])", 0, "the password is hunter2")
    with tracing.started("target", on=True), redis.Redis.from_url(redis_url) as client:
        with pytest.raises(redis.ResponseError, match="hunter2"):
            client.eval(*fails)
        with client.pipeline() as pipeline, pytest.raises(redis.ResponseError, match="hunter2"):
            pipeline.eval(*fails).execute()
        client.ping()
    failed = [span for span in kept.get_finished_spans() if span.status.status_code is StatusCode.ERROR]
    assert [span.attributes["error.type"] for span in failed if span.attributes] == ["ResponseError"] * 2
    assert "PING" in {span.name for span in kept.get_finished_spans()}
    assert "hunter2" not in "".join(span.to_json() for span in kept.get_finished_spans())
    assert not any(span.events or span.status.description for span in kept.get_finished_spans())


def test_a_service_ends_with_2_for_a_bad_url(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "target_service", "--bundle", str(tmp_path)],
        env=os.environ | {"ATSPEED_TARGET_REDIS_URL": "redis://:Secret#1@127.0.0.1:6379/0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--redis-url (ATSPEED_TARGET_REDIS_URL)" in done.stderr
    assert "Secret" not in done.stderr


def test_block_keys_are_the_same_in_another_process() -> None:
    program = (
        "import numpy as np; from atspeed.engine.kv.memory_cache import KvLayout, block_keys, namespace\n"
        "layout = KvLayout(layers=2, kv_heads=1, head_dim=2, dtype='float32', block_tokens=2)\n"
        "print([k.hex() for k in block_keys(namespace('weights', layout, 'tenant'), np.arange(6), 2)])"
    )
    here = [k.hex() for k in block_keys(namespace("weights", LAYOUT, "tenant"), np.arange(6), 2)]
    there = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert there.stdout.strip() == str(here)


def test_noise_is_the_same_in_another_process() -> None:
    """Python salts its own hashes per process; this noise must not depend on such a thing."""
    program = (
        "import numpy as np; from atspeed.engine.search.sampling import *;"
        "print(uniform(42, Stream.ACCEPT, np.arange(5, dtype=np.uint64)).tobytes().hex())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert printed == {uniform(42, Stream.ACCEPT, np.arange(5, dtype=np.uint64)).tobytes().hex()}
