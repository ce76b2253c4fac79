"""The console in a real browser: Debian's Chromium, headless, over real services and a real Envoy that ask for tokens."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from atspeed.edge.console_routes import FOLDER
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.local.edge import LocalEdge
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from atspeed_client import Client
from tests.conftest import mended
from tests.edge import needs_envoy
from tests.secured import write_tokens

NPM = Path(__file__).parents[2] / "var/npm/node_modules"
CHROMIUM = shutil.which("chromium")
PATIENCE_MS = 60_000
TOKENS = {"engineer": 'scopes = ["read", "write", "explain", "admin"]', "reader": 'scopes = ["read"]'}

pytestmark = needs_envoy
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium")
needs_npm = pytest.mark.skipif(not NPM.exists(), reason="tests/npm is not installed: make tools")


@pytest.fixture(scope="module")
def titled(bundle: Path, catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with titles, one of which would be markup."""
    titles = {catalogue.id_of(item): f"The <b>{item}</b>th film" for item in range(catalogue.items)}
    out = tmp_path_factory.mktemp("titled") / "bundle"
    return update_catalogue(Bundle(bundle), out, {}, [], titles).root


@pytest.fixture(scope="module")
def canary(titled: Path, catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models over half of the items."""
    gone = [catalogue.id_of(item) for item in range(0, catalogue.items, 2)]
    return update_catalogue(Bundle(titled), tmp_path_factory.mktemp("canary") / "bundle", {}, gone).root


@pytest.fixture(scope="module")
def served(
    titled: Path, canary: Path, redis_server: LocalRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, LocalStack]]:
    """The console's address, and the services behind it. They serve the canary to whom asks for it."""
    folder = tmp_path_factory.mktemp("console")
    write_tokens(folder / "tokens.toml", TOKENS)
    tracks: dict[str, object] = {"canary-bundle": canary}
    flags: dict[str, dict[str, object]] = {
        "draft": tracks,
        "target": tracks | {"threads": 1},
        "orchestrator": tracks
        | {"tokens-file": folder / "tokens.toml", "draft-timeout-seconds": 30, "planner": "fixed", "canary-share": 0},
    }
    with (
        LocalStack(titled, redis_url=mended(redis_server), log_folder=folder, flags=flags) as stack,
        LocalEdge([stack.address], folder / "edge.log", console=True) as edge,
    ):
        yield edge.url, stack


@pytest.fixture
def client(served: tuple[str, LocalStack]) -> Iterator[Client]:
    with Client(served[1].address, token="hush-engineer", timeout_seconds=60) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, served: tuple[str, LocalStack]) -> Iterator[Any]:
    """The open page. No script may fail in it, and nothing may be fetched from elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, problems, fetched = context.new_page(), list[str](), list[str]()
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if "Content Security Policy" in said.text else None)
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(f"{served[0]}/console/")
    yield page
    context.close()
    assert problems == []
    assert [url for url in fetched if not url.startswith((f"{served[0]}/", "data:"))] == []


def ask(page: Any, history: Sequence[str], caller: str = "engineer") -> None:
    """Ask for ten items from ten beams, and wait for the list."""
    page.fill("#token", f"hush-{caller}")
    page.fill("#history", ",".join(history))
    page.fill("#beam_width", "10")
    page.get_by_role("button", name="Explain").click()


def serious(page: Any) -> list[str]:
    """The faults that axe calls serious or critical, on the page as it is."""
    page.evaluate((NPM / "axe-core/axe.min.js").read_text())
    found = page.evaluate("axe.run()")
    assert found["passes"]
    return [
        f"{fault['id']}: {[node['html'][:120] for node in fault['nodes'][:3]]}"
        for fault in found["violations"]
        if fault["impact"] in {"serious", "critical"}
    ]


@needs_chromium
def test_a_request_is_shown_as_lists_tree_and_time(page: Any, client: Client, history: list[str]) -> None:
    ask(page, history)
    page.wait_for_selector("#list tbody tr")
    listed = client.recommend(history=history, k=10, beam_width=10)
    ids = "rows => rows.map(row => row.cells[2].textContent)"
    assert page.locator("#list tbody tr").evaluate_all(ids) == listed.item_ids
    page.wait_for_selector("#other tbody tr")
    assert page.locator("#other tbody tr").evaluate_all(ids) == listed.item_ids
    assert "both lists are equal" in page.inner_text("#summary")
    assert re.search(r"The <b>\d+</b>th film", page.inner_text("#list tbody tr"))
    nodes, beams = map(int, re.findall(r"\d+", page.inner_text("#tree-note"))[:2])
    assert page.get_by_role("treeitem").count() == nodes
    assert page.locator("#nodes tbody tr").count() == nodes
    assert page.locator("#nodes tbody tr", has_text="rank").count() == beams
    stages = page.locator("#waterfall tbody tr").evaluate_all("rows => rows.map(row => row.cells[0].textContent)")
    assert (stages[:2], stages[-1]) == (["admission", "history"], "selection")
    assert f"pass {listed.statistics.target_passes}" in " ".join(stages)


@needs_chromium
def test_a_stored_user_is_shown_too(page: Any, client: Client, history: list[str]) -> None:
    client.record("alice", history)
    page.fill("#token", "hush-engineer")
    page.fill("#user", "alice")
    page.get_by_role("button", name="Explain").click()
    page.wait_for_selector("#list tbody tr")
    page.get_by_text("History in the prompt").click()
    assert [re.search(r"\((.*)\)", line).group(1) for line in page.inner_text("#prompt").splitlines()] == history  # type: ignore[union-attr]


@needs_chromium
def test_fields_of_the_user_are_sent(page: Any, history: list[str]) -> None:
    """The bundle's prompts hold none, so the service names each field that it gets."""
    page.fill("#user_fields", "age=20 - 30, city = a=b")
    ask(page, history)
    page.get_by_role("alert").filter(has_text=re.compile(".")).wait_for()
    problem = page.inner_text("#error")
    assert "user_fields.age: is no field of the bundle's prompts" in problem
    assert "user_fields.city: is no field of the bundle's prompts" in problem
    page.fill("#user_fields", "age")
    ask(page, history)
    page.get_by_role("alert").filter(has_text="NAME=VALUE").wait_for()


@needs_chromium
def test_it_says_where_the_item_of_rank_25_was_lost(page: Any, client: Client, history: list[str]) -> None:
    item = client.recommend(history=history, k=40, beam_width=100, mode="target-only").item_ids[24]
    ask(page, history)
    page.wait_for_selector("#list tbody tr")
    page.fill("#items", item)
    page.get_by_role("button", name="Ask").click()
    answer = page.locator("#answers article").inner_text()
    assert "rank 25 in the target's own list with beam width 100" in answer
    assert re.search(r"The search lost its path on level \d: rank \d+ among the candidates, and 10 were kept", answer)
    assert "lost here" in answer


@needs_chromium
def test_stable_is_shown_beside_the_canary(page: Any, client: Client, history: list[str]) -> None:
    page.select_option("#track", "stable")
    page.select_option("#compared", "canary")
    ask(page, history)
    page.wait_for_selector("#other tbody tr")
    ids = "rows => rows.map(row => row.cells[2].textContent)"
    for table, track in (("list", "stable"), ("other", "canary")):
        listed = client.recommend(history=history, k=10, beam_width=10, track=track)
        assert page.locator(f"#{table} tbody tr").evaluate_all(ids) == listed.item_ids
    assert "the lists differ" in page.inner_text("#summary")
    assert page.inner_text("#other caption") == "Release track canary"


@needs_chromium
@needs_npm
def test_axe_finds_no_serious_fault(page: Any, history: list[str]) -> None:
    assert serious(page) == []
    ask(page, history)
    page.wait_for_selector("#list tbody tr")
    page.get_by_text("The tree as a table").click()
    page.fill("#items", f"{history[0]},nothing")
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("#answers article")
    assert serious(page) == []


@needs_chromium
def test_it_works_by_keyboard_alone(page: Any, history: list[str]) -> None:
    """From the first field to an answer, without a pointer."""
    keys, focused = page.keyboard, "document.activeElement.id"

    def tab_to(wanted: str) -> None:
        for _ in range(40):
            if page.evaluate(
                "document.activeElement.matches(arguments[0])".replace("arguments[0]", json.dumps(wanted))
            ):
                return
            keys.press("Tab")
        raise AssertionError(f"Tab does not reach {wanted}")

    tab_to("#history")
    keys.type(",".join(history))
    tab_to("#token")
    keys.type("hush-engineer")
    keys.press("Enter")
    page.wait_for_selector("#list tbody tr")
    assert page.evaluate(focused) == "results"
    tab_to('[role="treeitem"]')
    assert page.inner_text("#node").startswith("Root")
    keys.press("ArrowRight")
    assert page.inner_text("#node").startswith("Level 1, code ")
    first = page.inner_text("#node")
    keys.press("ArrowDown")
    assert page.inner_text("#node") != first
    keys.press("ArrowLeft")
    assert page.inner_text("#node").startswith("Root")
    tab_to("#items")
    keys.type("nothing")
    keys.press("Enter")
    page.wait_for_selector("#answers article")
    assert "does not know the item" in page.inner_text("#answers")


@needs_chromium
def test_a_refusal_is_said_in_the_services_words(page: Any, history: list[str]) -> None:
    ask(page, history, caller="reader")
    page.get_by_role("alert").filter(has_text=re.compile(".")).wait_for()
    alert = page.get_by_role("alert").inner_text()
    assert alert == "this method needs a token with the scope explain (HTTP 403)"
    ask(page, [*history, "x" * 300])
    page.get_by_role("alert").filter(has_text="400").wait_for()
    assert "history" in page.get_by_role("alert").inner_text()
    page.fill("#history", "")
    page.get_by_role("button", name="Explain").click()
    assert page.get_by_role("alert").inner_text() == "Give either a stored user or a history."


@needs_chromium
def test_the_token_stays_in_its_field(page: Any, history: list[str]) -> None:
    ask(page, history)
    page.wait_for_selector("#list tbody tr")
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0
    assert page.context.cookies() == []
    assert "hush" not in page.url
    page.reload()
    assert page.input_value("#token") == ""


def test_d3_is_the_file_that_the_page_names_by_its_hash() -> None:
    found = re.search(r'd3\.min\.js" integrity="sha384-([^"]+)"', (FOLDER / "index.html").read_text())
    assert found
    assert base64.b64encode(hashlib.sha384((FOLDER / "d3.min.js").read_bytes()).digest()).decode() == found[1]


@needs_npm
def test_d3_is_that_of_the_lock_file() -> None:
    for name, origin in (("d3.min.js", "dist/d3.min.js"), ("d3.LICENSE", "LICENSE")):
        assert (FOLDER / name).read_bytes() == (NPM / "d3" / origin).read_bytes()
