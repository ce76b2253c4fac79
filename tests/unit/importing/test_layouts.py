"""Layouts are data: known ones by name, others from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from atspeed.importing.errors import ImportingError
from atspeed.importing.layouts import LAYOUTS, PromptLayout, read_layout


def test_a_name_is_a_layout_and_options_change_it() -> None:
    assert read_layout("minionerec") == LAYOUTS["minionerec"]
    changed = read_layout("minionerec", {"tail": "", "max_items": 50})
    assert changed == LAYOUTS["minionerec"].model_copy(update={"tail": "", "max_items": 50})


def test_a_text_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """Blanks and line ends at the end of a prompt are tokens of it."""
    text = "Items {history} \r\n\n### Response:\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    assert read_layout(str(tmp_path / "prompt.txt")).segments == (text,)


def test_a_toml_file_holds_every_field(tmp_path: Path) -> None:
    path = tmp_path / "prompt.toml"
    path.write_text(
        'segments = ["a ", "b {history}"]\nseparator = ""\nitem = "[{item}]"\ntail = "\\n{eos}"\nmax_items = 7\n'
    )
    expected = PromptLayout(segments=("a ", "b {history}"), separator="", item="[{item}]", tail="\n{eos}", max_items=7)
    assert read_layout(str(path)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('segments = ["no place"]', "segments: must hold {history} exactly once"),
        ('segments = ["{history}", "{history}"]', "segments: must hold {history} exactly once"),
        ('segments = ["{user.history}: {history}"]', "segments: {user.history} would change from prompt to prompt"),
        ('segments = ["{number}: {history}"]', "segments: {number} would change from prompt to prompt"),
        ('segments = ["{age}, {user.age}: {history}"]', "segments: {age} stands more than once"),
        ('segments = ["{age}: {history}"]\nuser_defaults = {sex = "F"}', "user_defaults: sex is no field in segments"),
        ('segments = ["{history}"]\nitem = "x"', "item: must hold {item} or a field such as {title}"),
        ('segments = ["{history}"]\nitem = "{number}."', "item: must hold {item} or a field such as {title}"),
        ('segments = ["{history}"]\nitem = "{item} {item}"', "and each place once"),
        ('segments = ["{history}"]\nitem = "{title[0]}"', "item: {title[0]} is no field of an item"),
        ('segments = ["{history}"]\nseparator = "{number}"', "separator: {number} would change from prompt to prompt"),
        ('segments = ["{history}"]\ntail = "{eos} "', "tail: {eos} must be its end"),
        ('segments = ["{history}"]\ncode_names = ["<a>"]', "code_names: '<a>' must hold {} exactly once"),
        ('segments = ["{history}"]\nmax_items = 0', "max_items: "),
        ('segments = ["{history}"]\nmax_items = true', "max_items: "),
        ("segments = [", "prompt.toml: "),
        ("segments = " + "[" * 10_000, "prompt.toml: "),
        ('segments = ["{{history}}"]', "segments: {{history}} would change from prompt to prompt"),
        ('segments = ["{0} {history}"]', "segments: {0} would change from prompt to prompt"),
        ('segments = ["{user-id} {history}"]', "segments: {user-id} would change from prompt to prompt"),
        ('separator = ""', "segments: Field required"),
        ('segments = ["{history}"]\nother = 1', "other: "),
    ],
)
def test_a_mistake_in_a_file_names_the_field(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.toml").write_text(content)
    with pytest.raises(ImportingError) as caught:
        read_layout(str(tmp_path / "prompt.toml"))
    assert message in str(caught.value)
    assert "prompt.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["prompt.txt", "prompt.toml"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(name: str, tmp_path: Path) -> None:
    text = "A: {history}" if name.endswith(".txt") else 'segments = ["A: {history}"]'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_layout(str(tmp_path / name)).segments == ("A: {history}",)


def test_an_object_in_braces_is_text() -> None:
    assert PromptLayout(segments=('Answer {"item": 1} or {} to {history}',)).segments


def test_an_unknown_name_lists_the_layouts() -> None:
    with pytest.raises(ImportingError, match="no such file, and no layout; layouts are lc-rec, minionerec"):
        read_layout("minionrec")
