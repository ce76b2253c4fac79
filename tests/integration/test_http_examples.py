"""The examples of docs/http.md, run against a real Envoy before real services."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from atspeed.local.edge import LocalEdge
from atspeed.local.stack import LocalStack
from tests.edge import needs_envoy
from tests.serving import LIVENESS_SECONDS, Client

PAGE = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
SHOWN = "http://127.0.0.1:8080"
CURL = re.findall(r"(?m)^curl .*$", PAGE)
SCRIPTS = re.findall(r"(?ms)^```js\n(.*?)^```", PAGE)

pytestmark = [needs_envoy, pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")]


@pytest.fixture(scope="module")
def url(shared_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with LocalEdge([shared_stack.address], tmp_path_factory.mktemp("edge") / "edge.log") as edge:
        yield edge.url


def here(example: str, url: str) -> str:
    """An example with the address and the item ids of the services that run here."""
    return re.sub(r'"(\d+)"', r'"item-\1"', example.replace(SHOWN, url))


def test_there_are_examples_of_every_path() -> None:
    assert len(CURL) == 8
    assert len(SCRIPTS) == 1


def test_curl_gets_what_the_page_says(url: str, client: Client) -> None:
    """All lines, in their order: alice's events are recorded, used and erased."""
    shown = []
    for command in CURL:
        done = subprocess.run(
            ["bash", "-c", f"{here(command, url)} --fail-with-body"],
            capture_output=True,
            text=True,
            timeout=LIVENESS_SECONDS,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        shown.append(done.stdout)
    recorded, listed, batch, history, forgotten, info, health, document = shown
    assert json.loads(recorded)["history_length"] == 2
    assert len(json.loads(listed)["items"]) == 3
    assert {json.loads(line)["index"] for line in batch.splitlines()} == {0, 1}
    assert [event["item_id"] for event in json.loads(history)["events"]] == ["item-50", "item-172"]
    assert json.loads(forgotten) == {"existed": True}
    assert json.loads(info)["max_k"] == 50
    assert health == ""
    assert json.loads(document)["info"]["title"] == "AtSpeed Serving"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_prints_a_list(url: str, client: Client) -> None:
    (script,) = SCRIPTS
    command = ["node", "--input-type=module", "--eval", here(script, url)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIVENESS_SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall(r"item-\d+", done.stdout)) == 3
