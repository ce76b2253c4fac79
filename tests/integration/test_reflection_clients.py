"""Clients that are not ours: grpc-js with the .proto files, and buf with nothing but the server's reflection."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import grpc
import pytest

from atspeed.engine.bundle.catalogue import Catalogue
from tests import fetched
from tests.bundles import random_history
from tests.serving import LIVENESS_SECONDS, Client, ids

ROOT = Path(__file__).parents[2]
BUF = Path(sysconfig.get_path("scripts")) / "buf"  # comes as a wheel, beside this Python


@pytest.fixture(scope="module")
def history(catalogue: Catalogue) -> list[str]:
    return random_history(catalogue, 5, seed=8)


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """Return the folder in which grpc-js is installed."""
    return fetched.node_modules()


def grpc_js(modules: Path, address: str, request: dict[str, Any]) -> dict[str, Any]:
    """A recommendation asked for with grpc-js."""
    script = Path(__file__).with_name("grpc_js_client.js")
    done = subprocess.run(
        ["node", str(script), address, str(ROOT / "protos"), json.dumps(request)],
        env={**os.environ, "NODE_PATH": str(modules)},
        capture_output=True,
        text=True,
        check=True,
        timeout=2 * LIVENESS_SECONDS,
    )
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def buf_curl(address: str, method: str, request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """A call made with `buf curl`, which asks the server for its schema."""
    url = f"http://{address}/atspeed.v1.RecommendationService/{method}"
    return subprocess.run(
        [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", json.dumps(request), url],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * LIVENESS_SECONDS,
    )


def test_grpc_js_gets_the_same_list(node_modules: Path, client: Client, history: list[str]) -> None:
    expected = client.recommend(history)
    reply = grpc_js(node_modules, client.address, {"history": {"itemIds": history}, "k": 5})
    assert [item["itemId"] for item in reply["items"]] == ids(expected)
    assert [item["score"] for item in reply["items"]] == pytest.approx([i.score for i in expected.items], abs=1e-3)
    assert [item["codePath"] for item in reply["items"]] == [list(item.code_path) for item in expected.items]
    assert (reply["mode"], reply["scoringRule"]) == ("MODE_STRICT", "SCORING_RULE_VOCAB")


def test_grpc_js_gets_the_same_refusal(node_modules: Path, client: Client, history: list[str]) -> None:
    reply = grpc_js(node_modules, client.address, {"history": {"itemIds": history}, "k": 0})
    assert reply["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert reply["details"].startswith("k: ")


def test_grpc_js_decodes_the_details_of_an_error(node_modules: Path, client: Client, history: list[str]) -> None:
    reply = grpc_js(node_modules, client.address, {"history": {"itemIds": history}, "k": 0, "itemsPerPath": -1})
    status = reply["status"]
    assert (status["code"], status["message"]) == (reply["code"], reply["details"])
    assert status["ErrorInfo"] == {"reason": "INVALID_REQUEST", "domain": "atspeed"}
    violations = {one["field"]: one["description"] for one in status["BadRequest"]["fieldViolations"]}
    assert violations["k"].startswith("must be between 1 and")
    assert violations["items_per_path"] == "must be at least 0, got -1"


def test_buf_gets_the_same_list_by_reflection(client: Client, history: list[str]) -> None:
    done = buf_curl(client.address, "Recommend", {"history": {"itemIds": history}, "k": 5})
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert [item["itemId"] for item in reply["items"]] == ids(client.recommend(history))


def test_buf_reads_a_stream_by_reflection(client: Client, history: list[str]) -> None:
    """A batch comes back as one JSON object a line or more, in the order of its arrival."""
    requests = [{"history": {"itemIds": history}, "k": k} for k in (1, 2)]
    done = buf_curl(client.address, "RecommendBatch", {"requests": requests})
    assert done.returncode == 0, done.stderr
    decoder, text, counts = json.JSONDecoder(), done.stdout.strip(), {}
    while text:
        answer, end = decoder.raw_decode(text)
        counts[answer.get("index", 0)] = len(answer["response"]["items"])
        text = text[end:].lstrip()
    assert counts == {0: 1, 1: 2}


def test_buf_shows_the_refusal(client: Client, history: list[str]) -> None:
    done = buf_curl(client.address, "Recommend", {"history": {"itemIds": history}, "k": 0})
    assert done.returncode != 0
    assert json.loads(done.stderr)["code"] == "invalid_argument"
