"""Checks of the documents themselves: length of sentences, and purposes that fit into the file tree."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LONG = " ".join(["word"] * 15)


@pytest.fixture(scope="module")
def prose() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "prose.py"))


@pytest.fixture(scope="module")
def file_tree() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "file_tree.py"))


def copy_of_prose(folder: Path, readme: str) -> subprocess.CompletedProcess[str]:
    """Run the check of prose in a project of one page."""
    script = folder / "docs" / "prose.py"
    script.parent.mkdir()
    script.write_text((ROOT / "docs" / "prose.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)


def test_the_prose_of_all_pages_passes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "prose.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_prose_of_long_sentences_fails(tmp_path: Path) -> None:
    done = copy_of_prose(tmp_path, f"# Title\n\n{LONG}.\n")
    assert done.returncode == 1
    assert "README.md" in done.stderr


def test_prose_of_short_sentences_passes(tmp_path: Path) -> None:
    assert copy_of_prose(tmp_path, "# Title\n\nA short sentence.\n").returncode == 0


def test_a_readme_of_too_many_lines_fails(tmp_path: Path) -> None:
    assert copy_of_prose(tmp_path, "A short sentence.\n" * 151).returncode == 1


def test_tables_code_and_headings_are_no_sentences(prose: dict[str, Any]) -> None:
    text = f"# {LONG}\n\n| {LONG} |\n\n```sh\n{LONG}\n```\n\nOne sentence.\nAnd a second: with a [link]({LONG}).\n"
    assert prose["sentences"](text) == ["One sentence.", "And a second:", "with a [link]."]


def test_each_item_of_a_list_is_a_sentence(prose: dict[str, Any]) -> None:
    assert prose["sentences"]("- one item\n- another item\n1. a third item\n") == [
        "one item",
        "another item",
        "a third item",
    ]


def test_the_purpose_of_a_module_is_the_first_sentence_of_its_docstring(
    tmp_path: Path, file_tree: dict[str, Any]
) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""Reads files\nof a bundle. More.\n\nEven more.\n"""\n', encoding="utf-8")
    assert file_tree["_purpose"](module) == "Reads files of a bundle"


def test_a_purpose_of_eighty_characters_fits(tmp_path: Path, file_tree: dict[str, Any]) -> None:
    module = tmp_path / "module.py"
    module.write_text(f'"""{"x" * 80}."""\n', encoding="utf-8")
    assert file_tree["_purpose"](module) == "x" * 80


def test_a_purpose_that_is_too_long_fails(
    tmp_path: Path, file_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "module.py"
    module.write_text(f'"""{"x" * 81}."""\n', encoding="utf-8")
    monkeypatch.setitem(file_tree["_purpose"].__globals__, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"module\.py: the docstring's first sentence has 81 characters"):
        file_tree["_purpose"](module)


def test_a_module_without_a_docstring_fails(tmp_path: Path, file_tree: dict[str, Any]) -> None:
    module = tmp_path / "module.py"
    module.write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no docstring"):
        file_tree["_purpose"](module)
