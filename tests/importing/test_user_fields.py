"""Prompts with fields of users: token by token those of the user's own tokenizer, or refused."""

from __future__ import annotations

import json
from itertools import product
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

AGES, SEXES = ["under 18", "18-24", "25-34", "5", "56+"], ["F", "M", "not said"]
TEXTS = {
    "before": "A {sex} user of age {user.age} has bought: {history}\n\n### Response:\n",
    "around": "Age: {age}.\n{history}\nThe user is {sex}\n",
    "behind": "Items: {history}. Age {age}, sex {sex}. Next:",
}


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("made"), random_paths(30, 5), tokenizer=request.param, users=30)


def users_file(made: MadeCheckpoint, users: list[dict[str, str]], name: str = "users.jsonl") -> Path:
    path = made.folder.parent / name
    path.write_text("\n".join(json.dumps({"user": place} | user) for place, user in enumerate(users)))
    return path


def read(made: MadeCheckpoint, layout: PromptLayout, users: list[dict[str, str]] | None) -> ReadFiles:
    path = None if users is None else users_file(made, users)
    files = ImportFiles(Source(made.folder), made.index, made.histories, user_fields=path)
    return read_files(files, ImportChoices("made", layout, "test"))


def served(found: ReadFiles, history: list[str], user: dict[str, str]) -> list[int]:
    """The prompt that a bundle serves."""
    prompts = Prompts(found.spelling.prompt, found.catalogue, np.asarray(found.spelling.code_tokens), found.texts)
    tokens: list[int] = prompts.tokens(found.catalogue.find(history), user).tolist()
    return tokens


def own_text(made: MadeCheckpoint, text: str, history: list[str], user: dict[str, str], most: int) -> list[int]:
    """The user's own text through the tokenizer."""
    items = ", ".join("".join(made.paths[item]) for item in history[-most:])
    written = text.replace("{user.age}", "{age}").format(history=items, **user)
    tokens: list[int] = made.tokenizer(written)["input_ids"]
    return tokens


@pytest.mark.parametrize("made", ["bpe", "unigram", "normalising"], indirect=True)
@pytest.mark.parametrize("name", ["before", "around", "behind"])
def test_a_bundle_serves_the_users_tokens(name: str, made: MadeCheckpoint) -> None:
    """In all combinations of values, also those of no user of the file."""
    layout = PromptLayout(segments=(TEXTS[name],), max_items=5)
    users = [{"age": age, "sex": SEXES[place % 3]} for place, age in enumerate(AGES)]
    found = read(made, layout, users)
    for history in random_users(list(made.paths), 8, 9, longest=8):
        for age, sex in product(AGES, SEXES):
            user = {"age": age, "sex": sex}
            assert served(found, history, user) == own_text(made, TEXTS[name], history, user, 5)


@pytest.mark.parametrize("made", ["bpe"], indirect=True)
def test_a_default_is_a_value_too(made: MadeCheckpoint) -> None:
    layout = PromptLayout(segments=(TEXTS["before"],), max_items=5, user_defaults={"age": "unknown"})
    found = read(made, layout, [{"age": "5", "sex": "F"}, {"sex": "M"}])
    for user in ({"sex": "F"}, {"sex": "M", "age": "unknown"}):
        expected = own_text(made, TEXTS["before"], ["3", "4"], {"age": "unknown"} | user, 5)
        assert served(found, ["3", "4"], user) == expected


def refused(made: MadeCheckpoint, layout: PromptLayout, users: list[dict[str, str]]) -> str:
    """Why an import refuses a prompt; empty if it does not."""
    try:
        read(made, layout, users)
    except ImportingError as error:
        return str(error)
    return ""


EDGES = ["", " ", "\n", ".", ", ", ":", " (", ") ", "### "]
VALUES = st.lists(
    st.text(st.sampled_from("ab .,:()\n#1é"), min_size=1, max_size=5), min_size=1, max_size=3, unique=True
)


@pytest.mark.parametrize("made", ["bpe", "unigram", "normalising"], indirect=True)
@settings(max_examples=either(15, 300))
@given(data=st.data())
def test_any_value_is_served_as_it_is_or_refused(data: st.DataObject, made: MadeCheckpoint) -> None:
    edges = [data.draw(st.sampled_from(EDGES)) for _ in range(4)]
    order = data.draw(st.permutations(["{age}", "{sex}", "{history}"]))
    text = edges[0] + order[0] + edges[1] + order[1] + edges[2] + order[2] + edges[3]
    values = {"age": data.draw(VALUES), "sex": data.draw(VALUES)}
    users = [
        {name: drawn[place % len(drawn)] for name, drawn in values.items()}
        for place in range(max(map(len, values.values())))
    ]
    layout = PromptLayout(segments=(f"Items{text}Next",), max_items=3)
    if refusal := refused(made, layout, users):
        assert "segments that stay what they are" in refusal or "stand 0 times" in refusal
        return
    found = read(made, layout, users)
    for history in random_users(list(made.paths), 6, 2, longest=4):
        for age, sex in product(*values.values()):
            user = {"age": age, "sex": sex}
            assert served(found, history, user) == own_text(made, f"Items{text}Next", history, user, 3)


USERS = [{"age": "5", "sex": "F"}, {"age": "56+", "sex": "M"}]


@pytest.mark.parametrize("made", ["bpe"], indirect=True)
@pytest.mark.parametrize(
    ("text", "item", "users", "message"),
    [
        ("{age}: {history}", "{item}", None, r"prompt: \{age\} is a field of users; --user-fields gives a file"),
        ("Items: {history}", "{item}", USERS, "the prompt holds no field of users"),
        ("{job}: {history}", "{item}", USERS, "line 1: no text or whole number job, which the prompt holds"),
        ("{age}: {history}", "{item}", [{"age": ""}], "line 1: no text or whole number age"),
        ("{age}: {history}", "{item}", [], "holds no user"),
        ("{age}: {history}", "{item}", [{"age": "é" * 200}], "line 1: age has more than 256 bytes"),
        ("{age}: {history}", "{item}", [{"age": str(age)} for age in range(1001)], "age has 1,001 values"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(
    text: str, item: str, users: list[dict[str, str]] | None, message: str, made: MadeCheckpoint
) -> None:
    with pytest.raises(ImportingError, match=message) as caught:
        read(made, PromptLayout(segments=(text,), item=item, max_items=5), users)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("made", ["bpe"], indirect=True)
def test_a_field_beside_a_title_is_refused(made: MadeCheckpoint) -> None:
    """A tokenizer may merge both, and titles are many."""
    items = made.folder.parent / "items.jsonl"
    items.write_text("\n".join(json.dumps({"id": item, "title": f"{item}t"}) for item in made.paths))
    users = users_file(made, [{"age": "5"}, {"age": "6"}])
    files = ImportFiles(Source(made.folder), made.index, made.histories, items, user_fields=users)
    for text, fits in (("Age {age}\n{history}.", True), ("Age {age}{history}.", False)):
        layout = PromptLayout(segments=(text,), item="{title} ", separator="\n", max_items=3)
        if fits:
            assert read_files(files, ImportChoices("made", layout, "test")).prompts == len(made.users)
            continue
        with pytest.raises(ImportingError, match=r"no token stands between \{age\} and the text of an item"):
            read_files(files, ImportChoices("made", layout, "test"))


@pytest.mark.parametrize("made", ["bpe"], indirect=True)
def test_users_stand_in_an_object_too(made: MadeCheckpoint) -> None:
    path = made.folder.parent / "users.json"
    path.write_text(json.dumps({"ada": {"age": 5}, "bob": {"age": 56}}))
    files = ImportFiles(Source(made.folder), made.index, made.histories, user_fields=path)
    layout = PromptLayout(segments=("Age {age}: {history}\n",), max_items=5)
    found = read_files(files, ImportChoices("made", layout, "test"))
    assert list(found.spelling.prompt.user_fields[0].values) == ["5", "56"]
    path.write_text(json.dumps({"ada": 5}))
    with pytest.raises(ImportingError, match="user 'ada': not an object with the fields of a user"):
        read_files(files, ImportChoices("made", layout, "test"))
