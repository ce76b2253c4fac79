"""Measure the prose of the README and of docs/: words a sentence, lines.

`--check` fails when a page's mean is above 14 words a sentence, or when the README has more than 150 lines. Sentences end
at . ! ? and : before a space. Headings, tables, code blocks and generated pages do not count.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]
MAX_MEAN_WORDS = 14
MAX_README_LINES = 150
# Written by generators: their sentences are settings' and metrics' help texts, or captions of measurements.
GENERATED = {"settings.md", "metrics.md"}


def sentences(text: str) -> list[str]:
    """Split Markdown into sentences, without code blocks, tables, headings, comments and list marks."""
    text = re.sub(r"(?ms)^\s*(```|~~~).*?^\s*\1", "", text)
    text = re.sub(r"(?s)<!--.*?-->", "", text)
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        lines = [line for line in paragraph.splitlines() if not re.match(r"\s*(\||#)", line)]
        prose = re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", " ".join(lines))
        prose = re.sub(r"\]\([^)]*\)", "]", prose)  # a link's address is not read
        found += [part for part in re.split(r"(?<=[.!?:])\s+", prose) if re.search(r"\w", part)]
    return found


def pages() -> list[Path]:
    """Return the README and every page of docs/ that people write."""
    written = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in GENERATED]
    return [ROOT / "README.md", *(page for page in written if "benchmarks" not in page.parts or page.stem == "README")]


def main() -> None:
    """Print a line for each page, and with `--check` fail where one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check, too_long = parser.parse_args().check, []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        found = sentences(text)
        words = mean(len(sentence.split()) for sentence in found) if found else 0.0
        name = page.relative_to(ROOT).as_posix()
        print(f"{name:<52}{len(text.splitlines()):>6} lines{words:>7.1f} words a sentence")
        if words > MAX_MEAN_WORDS or (
            page.name == "README.md" and page.parent == ROOT and text.count("\n") > MAX_README_LINES
        ):
            too_long.append(name)
    if check and too_long:
        sys.exit(f"docs/prose.py: too long: {', '.join(too_long)}")


if __name__ == "__main__":
    main()
