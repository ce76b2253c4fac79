"""A page in a real browser: lists by fetch and by gRPC-Web from another origin, as CORS allows."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest

from atspeed.local.edge import LocalEdge
from atspeed.local.stack import LocalStack
from tests import fetched
from tests.edge import needs_envoy
from tests.serving import LIVENESS_SECONDS, Client, ids

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell"))), None)

pytestmark = [needs_envoy, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Write nothing."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server of the page, of the contract and of the libraries that it loads."""
    folder, modules = tmp_path_factory.mktemp("page"), fetched.node_modules()
    shutil.copy(Path(__file__).with_name("page.html"), folder)
    shutil.copy(modules / "grpc-web" / "index.esm.js", folder / "grpc-web.js")
    shutil.copy(modules / "protobufjs" / "dist" / "protobuf.min.js", folder)
    for tree in ("atspeed", "google"):
        shutil.copytree(ROOT / "protos" / tree, folder / "protos" / tree)
    with as_file(files("grpc_tools") / "_proto" / "google" / "protobuf") as well_known:
        shutil.copytree(well_known, folder / "protos" / "google" / "protobuf")
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def edge(shared_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEdge]:
    with LocalEdge([shared_stack.address], tmp_path_factory.mktemp("edge") / "edge.log") as edge:
        yield edge


def opened(origin: str, edge: LocalEdge, history: list[str], profile: Path) -> Any:
    """The answers that the page got, opened at an origin. Every host name is this machine."""
    asked = urllib.parse.quote(json.dumps([edge.url, history]))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * 127.0.0.1", "--virtual-time-budget=30000"]
    url = f"{origin}/page.html#{asked}"
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=2 * LIVENESS_SECONDS, check=True)
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found, done.stdout[-1000:] + done.stderr[-1000:]
    return json.loads(html.unescape(found[1]))


def test_a_page_of_this_machine_gets_lists_both_ways(
    port: int, edge: LocalEdge, client: Client, history: list[str], tmp_path: Path
) -> None:
    expected = ids(client.recommend(history, k=5))
    answers = opened(f"http://localhost:{port}", edge, history, tmp_path)
    assert "failed" not in answers, answers
    assert answers["fetched"] == [[200, "from-page", expected], [400, "from-page", "INVALID_REQUEST"]]
    listed, (code, message) = answers["called"]
    assert listed == [0, expected]
    assert code == 3
    assert urllib.parse.unquote(message).startswith("k: must be ")


def test_a_page_of_another_origin_gets_nothing(port: int, edge: LocalEdge, history: list[str], tmp_path: Path) -> None:
    answers = opened(f"http://shop.example:{port}", edge, history, tmp_path)
    assert answers == {"fetched": [], "called": [], "failed": "TypeError: Failed to fetch"}
