"""Documents lead somewhere: their links, and the files that they name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from atspeed.artefacts.object_store import EXTRAS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def named(text: str) -> set[str]:
    """Paths of files in code spans; `folder/{a,b}.py` is two."""
    paths = set()
    for before, choices, after in re.findall(
        r"`([\w./-]+/)(?:\{([\w,]+)\})?([\w.-]*\.(?:json|md|proto|py|sh|toml|ya?ml))`", text
    ):
        paths |= {f"{before}{choice}{after}" for choice in choices.split(",")}
    return paths


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# Results of measurements name their commands, whose files need not be there; the log is history.
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "log.md" and "benchmarks" not in page.parts],
    ids=lambda page: page.name,
)
def test_files_that_are_named_are_there(page: Path) -> None:
    paths = named(page.read_text(encoding="utf-8"))
    assert [path for path in sorted(paths) if not (ROOT / path).exists() and not (page.parent / path).exists()] == []


def test_paths_are_found_in_code_spans() -> None:
    text = "`atspeed/engine/search/plan.py`, `atspeed/rpc/{wire,server}.py`, `deploy/envoy/envoy.yaml`, not `plan.py` or x/y.py"
    assert named(text) == {
        "atspeed/engine/search/plan.py",
        "atspeed/rpc/wire.py",
        "atspeed/rpc/server.py",
        "deploy/envoy/envoy.yaml",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_extras_that_are_named_are_there(page: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named_extras = re.findall(r"(?:atspeed-serving|'\.)\[([\w,-]+)\]", page.read_text(encoding="utf-8"))
    assert {extra for extras in named_extras for extra in extras.split(",")} <= set(project["optional-dependencies"])


def test_each_scheme_of_a_bundle_has_its_extra() -> None:
    rows = re.findall(
        r"(?m)^\| `(\w+)://[^`]*` \| `([\w-]+)` \|", (ROOT / "docs/artefacts.md").read_text(encoding="utf-8")
    )
    assert len(rows) == 4
    assert {scheme: EXTRAS[scheme] for scheme, _ in rows} == dict(rows)
