"""Prompts of every layout are, token by token, those of its authors' code and those that a bundle serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atspeed.importing.checkpoint import Source
from atspeed.importing.errors import ImportingError
from atspeed.importing.layouts import LAYOUTS, PromptLayout
from atspeed.importing.reading import ImportChoices, ImportFiles, ReadFiles, read_files
from atspeed.importing.template import split_prompt
from atspeed.importing.user_prompt import UserPrompt, user_prompt
from tests.authors_prompts import PROMPTS
from tests.checkpoints import (
    TOKENIZERS,
    MadeCheckpoint,
    make_checkpoint,
    normalising_tokenizer,
    random_paths,
    random_users,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("made"), random_paths(30, 5))


def read(made: MadeCheckpoint, layout: PromptLayout) -> ReadFiles:
    """Read the files of a checkpoint as an import does."""
    files = ImportFiles(Source(made.folder), made.index, made.histories)
    return read_files(files, ImportChoices("made", layout, "test"))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("layout", PROMPTS)
def test_a_layout_renders_the_authors_prompts(layout: str, tokenizer: str) -> None:
    paths = random_paths(30, 4)
    names = [name for path in paths.values() for name in path]
    loaded = TOKENIZERS[tokenizer]([*names, "<|sid_begin|>", "<|sid_end|>"])
    user = UserPrompt(LAYOUTS[layout], loaded, lambda item: "".join(paths[item]))
    histories = random_users(list(paths), 60, 3, longest=30)  # also longer than the prompt's window
    expected = [PROMPTS[layout](loaded, paths, history) for history in histories]
    assert [tokens for batch in user.batches(histories) for tokens in batch] == expected
    assert [user.tokens(history) for history in histories[:3]] == expected[:3]


@pytest.mark.parametrize("layout", ["lc-rec", "minionerec", "mimigenrec"])
def test_a_bundle_serves_the_users_tokens(layout: str, made: MadeCheckpoint) -> None:
    """The catalogue and the code tokens alone spell the same prompts, by the names that the tokenizer has for them."""
    found = read(made, LAYOUTS[layout])
    assert found.prompts == len(made.users)
    user = user_prompt(LAYOUTS[layout], made.tokenizer, found.catalogue, found.spelling.code_tokens)
    template = found.spelling.prompt
    for history in made.users:
        expected = PROMPTS[layout](made.tokenizer, made.paths, history)
        window = found.catalogue.find(history)[template.window_start(len(history)) :]
        served = template.tokens(found.catalogue.spelled_tokens(window, found.spelling.code_tokens))
        assert served.tolist() == expected
        assert user.tokens(history) == expected


def test_names_that_only_match_behind_a_blank_are_refused(tmp_path: Path) -> None:
    """transformers adds names as normalised ones; LLaMA's normalizer then finds the first code of an item and no other."""
    made = make_checkpoint(tmp_path, random_paths(10, 5), architecture="llama")
    names = [name for path in made.paths.values() for name in path]
    normalising_tokenizer(names, normalized=True).save_pretrained(made.folder)
    edit_vocabulary(made.folder)
    with pytest.raises(ImportingError, match=r"the codes of item '.*' do not encode to their tokens, but to '▁<a_"):
        read(made, LAYOUTS["lc-rec"])
    with pytest.raises(ImportingError, match=r"the codes of item '.*' stand 0 times in a prompt of that item"):
        read(made, LAYOUTS["lc-rec"].model_copy(update={"tail": ""}))


def edit_vocabulary(folder: Path) -> None:
    """Give the config as many rows as any tokenizer here needs."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2000}))


class Numbered(UserPrompt):
    """A prompt of numbered items: the text before an item changes with its place."""

    def texts(self, history: Any, user_fields: Any) -> list[str]:
        items = ", ".join(f"{place}. {self.semantic_id(item)}" for place, item in enumerate(history, start=1))
        return [segment.replace("{history}", items) for segment in self.layout.segments]


def test_texts_that_change_are_refused_with_the_first_difference(
    made: MadeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atspeed.importing.reading.UserPrompt", Numbered)
    with pytest.raises(ImportingError) as caught:
        read(made, PromptLayout(segments=("Items: {history}.\n",), max_items=50))
    # The first history has one item, the second two; the third one's number 3 is the first that no separator holds.
    assert "line 3: the prompt is not made of segments that stay what they are: token " in str(caught.value)
    assert "is '3' (" in str(caught.value)
    assert "and '2' (" in str(caught.value)


def test_a_merge_across_the_end_of_an_item_is_refused(made: MadeCheckpoint) -> None:
    """Code names that are no tokens of their own would be merged with their surroundings."""
    user = UserPrompt(PromptLayout(segments=("Items: {history}.",)), made.tokenizer, lambda item: f"<x_{item}>")
    with pytest.raises(ImportingError, match="the codes of item '0' stand 0 times in a prompt of that item"):
        split_prompt(user, lambda item: made_tokens(made, item), "0")


def made_tokens(made: MadeCheckpoint, item: str) -> Any:
    return np.asarray(made.tokenizer.convert_tokens_to_ids(made.paths[item]))


def test_the_loaded_tokenizer_is_that_of_its_file(tmp_path: Path) -> None:
    """transformers 5 builds a Qwen2 tokenizer anew, with other words. The file decides how the model was trained."""
    made = make_checkpoint(tmp_path, random_paths(10, 5), architecture="qwen2", tokenizer="unigram")
    loaded = Source(made.folder).tokenizer()
    text = "### Response:\n<a_1> items, and so on"
    assert loaded(text)["input_ids"] == made.tokenizer(text)["input_ids"]
