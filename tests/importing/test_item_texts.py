"""Prompts with numbered items, titles and other fields: token by token those of the user's own code, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.bundle.prompts import Prompts
from atspeed.importing.checkpoint import Source
from atspeed.importing.errors import ImportingError
from atspeed.importing.layouts import PromptLayout
from atspeed.importing.reading import ImportChoices, ImportFiles, ReadFiles, read_files
from tests.checkpoints import MadeCheckpoint, make_checkpoint, random_paths, random_users
from tests.profiles import either

# Ends that a tokenizer may merge with a line feed, a comma or a blank; beginnings with blanks; numbers and other scripts.
TITLES = [
    "HP 74 (CB335WN)",
    "Response.",
    "Pen:",
    "paper ",
    " items",
    "A 12",
    "a_1",
    "été",
    "智能",
    "### Input",
    "<a>",
    ", ,",
]
Render = Callable[[MadeCheckpoint, Sequence[str]], str]


def title(item: str) -> str:
    """The title of an item: no two are equal."""
    return f"{item} {TITLES[int(item) % len(TITLES)]}" if int(item) % 2 else f"{TITLES[int(item) % len(TITLES)]}{item}."


def spelled(made: MadeCheckpoint, item: str) -> str:
    """The names of an item's codes."""
    return "".join(made.paths[item])


def numbered(made: MadeCheckpoint, history: Sequence[str]) -> str:
    """1. <a_1><b_2>"""
    lines = [f"{number}. {spelled(made, item)}" for number, item in enumerate(history[-7:], start=1)]
    return "Items:\n" + "\n".join(lines) + "\n\n### Response:\n"


def titled(made: MadeCheckpoint, history: Sequence[str]) -> str:
    """1. title <a_1><b_2>"""
    lines = [f"{number}. {title(item)} {spelled(made, item)}" for number, item in enumerate(history[-7:], start=1)]
    return "Items:\n" + "\n".join(lines) + "\n\n### Response:\n"


def titles_only(made: MadeCheckpoint, history: Sequence[str]) -> str:
    """A text whose items hold no codes."""
    return "The user has:\n" + "".join(f"- {title(item)}\n" for item in history[-7:]) + "\n\n### Response:\n"


def branded(made: MadeCheckpoint, history: Sequence[str]) -> str:
    """A second field, and numbers of two digits."""
    lines = [
        f"{number}) {spelled(made, item)} by {int(item) % 3}, {title(item)}"
        for number, item in enumerate(history[-12:], 1)
    ]
    return "Items " + "; ".join(lines) + ". Next:"


LAYOUTS: dict[str, tuple[Render, PromptLayout]] = {
    "numbered": (
        numbered,
        PromptLayout(segments=("Items:\n{history}\n\n### Response:\n",), item="{number}. {item}", separator="\n", max_items=7),
    ),
    "titled": (
        titled,
        PromptLayout(
            segments=("Items:\n{history}\n\n### Response:\n",), item="{number}. {title} {item}", separator="\n", max_items=7
        ),
    ),
    "titles-only": (
        titles_only,
        PromptLayout(
            segments=("The user has:\n{history}\n\n### Response:\n",), item="- {title}\n", separator="", max_items=7
        ),
    ),
    "branded": (
        branded,
        PromptLayout(
            segments=("Items {history}. Next:",), item="{number}) {item} by {brand}, {title}", separator="; ", max_items=12
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    checkpoint = make_checkpoint(
        tmp_path_factory.mktemp("made"), random_paths(30, 5), tokenizer=request.param, users=30
    )
    lines = (json.dumps({"id": item, "title": title(item), "brand": int(item) % 3}) for item in checkpoint.paths)
    (checkpoint.folder.parent / "items.jsonl").write_text("\n".join(lines))
    return checkpoint


def read(made: MadeCheckpoint, layout: PromptLayout, items: str | None = "items.jsonl") -> ReadFiles:
    """Read the files of a checkpoint as an import does."""
    files = ImportFiles(Source(made.folder), made.index, made.histories, made.folder.parent / items if items else None)
    return read_files(files, ImportChoices("made", layout, "test"))


def served(found: ReadFiles, history: Sequence[str]) -> list[int]:
    """The prompt that a bundle serves, from the catalogue, the template and the texts alone."""
    tokens = np.asarray(found.spelling.code_tokens)
    prompts = Prompts(found.spelling.prompt, found.catalogue, tokens, found.texts)
    rendered: list[int] = prompts.tokens(found.catalogue.find(history)).tolist()
    return rendered


@pytest.mark.parametrize("made", ["bpe", "unigram"], indirect=True)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_bundle_serves_the_users_tokens(name: str, made: MadeCheckpoint) -> None:
    """On histories that the import has not seen, too: of every length, and longer than the window."""
    render, layout = LAYOUTS[name]
    found = read(made, layout)
    assert found.prompts == len(made.users)
    assert (found.texts is None) == (name == "numbered")
    for history in random_users(list(made.paths), 100, 9, longest=30):
        assert served(found, history) == made.tokenizer(render(made, history))["input_ids"]


def test_the_end_of_a_text_depends_on_what_follows(tmp_path: Path) -> None:
    """A merge of a full stop with line feeds, one behind an item and two at the end of the history."""
    made = make_checkpoint(tmp_path, random_paths(12, 5), users=20)
    merged = made.tokenizer.convert_ids_to_tokens(made.tokenizer("a. \n\n")["input_ids"])
    assert merged[-1] not in {"Ċ", "."}
    (tmp_path / "items.json").write_text(
        json.dumps({item: {"title": f"{item} \n" * (int(item) % 2) or "x "} for item in made.paths})
    )
    layout = PromptLayout(segments=("Items:\n{history}\n\n### Response:",), item="{number}. {title}", separator="\n")
    found = read(made, layout, "items.json")
    assert found.texts is not None
    assert not found.texts.inner.equals(found.texts.last)


EDGES = ["", " ", "\n", "\n\n", ". ", ", ", ":", " (", ") ", "### "]
WORDS = st.text(st.sampled_from("ab .,:()\n#1é"), max_size=6)


@pytest.mark.parametrize("made", ["bpe", "unigram", "normalising"], indirect=True)
@settings(max_examples=either(10, 200))
@given(data=st.data())
def test_any_text_is_served_as_it_is_or_refused(data: st.DataObject, made: MadeCheckpoint) -> None:
    """Either the import refuses a prompt, or it is served as the user writes it, on other histories than those compared."""
    before, between, behind = (data.draw(st.sampled_from(EDGES)) for _ in range(3))
    item = data.draw(
        st.sampled_from(["{title}", "{number}{title}", "{title} {item}", "{number}.{item} {title}", "{item}{number}"])
    )
    layout = PromptLayout(
        segments=(f"Items{before}{{history}}{behind}Next",), item=item, separator=between, max_items=5
    )
    names = {each: data.draw(WORDS) for each in list(made.paths)[:6]}
    (made.folder.parent / "drawn.json").write_text(json.dumps({each: {"title": name} for each, name in names.items()}))
    users = random_users(list(names), 12, 1, longest=6)
    (made.folder.parent / "drawn.jsonl").write_text("\n".join(json.dumps({"items": user}) for user in users))
    files = ImportFiles(
        Source(made.folder), made.index, made.folder.parent / "drawn.jsonl", made.folder.parent / "drawn.json"
    )
    choices = ImportChoices("made", layout, "test")
    if refusal := refused(files, choices):
        assert "segments that stay what they are" in refusal or "stand 0 times" in refusal
        return
    found = read_files(files, choices)
    for history in random_users(list(names), 30, 2, longest=9):
        items = [
            item.format(number=number, item=spelled(made, each), title=names[each])
            for number, each in enumerate(history[-5:], start=1)
        ]
        assert served(found, history) == made.tokenizer(f"Items{before}{between.join(items)}{behind}Next")["input_ids"]


def refused(files: ImportFiles, choices: ImportChoices) -> str:
    """Why an import refuses files; empty if it does not."""
    try:
        read_files(files, choices)
    except ImportingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("item", "items", "message"),
    [
        ("{title}", None, r"prompt: \{title\} is a field of items; --items gives a file"),
        ("{author}", "items.jsonl", r"items\.jsonl: item '.*': no text or whole number author, which the prompt holds"),
        ("{item} ({number})", None, r"segments that stay what they are: token \d+ is '2' \(\d+\) in the user's prompt and '1'"),
        ("{title} ({number})", "items.jsonl", "segments that stay what they are"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_served_is_refused(item: str, items: str | None, message: str, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, random_paths(10, 5), users=10)
    lines = (json.dumps({"id": each, "title": title(each)}) for each in made.paths)
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    with pytest.raises(ImportingError, match=message) as caught:
        read(made, PromptLayout(segments=("Items: {history}",), item=item), items)
    assert "\n" not in str(caught.value)


def test_titles_stand_in_an_index_of_lines(tmp_path: Path) -> None:
    """MiniOneRec's info files hold them."""
    made = make_checkpoint(tmp_path, random_paths(10, 5), users=10)
    lines = (f"{spelled(made, item)}\t{title(item)}\t{item}" for item in made.paths)
    (tmp_path / "info.txt").write_text("\n".join(lines))
    files = ImportFiles(Source(made.folder), tmp_path / "info.txt", made.histories)
    layout = PromptLayout(segments=("Items:\n{history}\n",), item="{number}. {title}", separator="\n")
    found = read_files(files, ImportChoices("made", layout, "test"))
    text = (
        "Items:\n" + "\n".join(f"{number}. {title(item).strip()}" for number, item in enumerate("135", start=1)) + "\n"
    )
    assert served(found, list("135")) == made.tokenizer(text)["input_ids"]
