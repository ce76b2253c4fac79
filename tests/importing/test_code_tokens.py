"""Tokens are looked up by name; columns are dense and in natural order; tails stand behind the codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.importing.code_tokens import SpelledItems, check_labels, code_columns, name_tokens, tail_tokens
from atspeed.importing.errors import ImportingError
from atspeed.importing.index import Index, read_index
from atspeed.importing.layouts import PromptLayout
from atspeed.importing.user_prompt import UserPrompt
from tests.checkpoints import TOKENIZERS, bpe_tokenizer

LAYOUT = PromptLayout(segments=("{history}",), tail="\n{eos}")


def index_of(paths: dict[str, list[str]], tmp_path: Path) -> Index:
    """An index, read back from its file."""
    (tmp_path / "index.json").write_text(json.dumps(paths))
    return read_index(tmp_path / "index.json", LAYOUT)


@pytest.mark.parametrize("form", ["<a_{}>", "[a_{}]", "<|a_{}|>", "<s_a_{}>", "a{}!"])
def test_columns_have_natural_order_whatever_the_token_ids(form: str, tmp_path: Path) -> None:
    """Authors add names in lexicographic order, so ids are not in the order of the numbers."""
    numbers = [0, 2, 10, 9, 100, 11, 255]
    index = index_of({str(item): [form.format(number)] for item, number in enumerate(numbers)}, tmp_path)
    tokenizer = bpe_tokenizer(index.names)
    columns = code_columns(index, name_tokens(index, tokenizer, 10_000), [])
    ordered = [form.format(number) for number in sorted(numbers)]
    assert tokenizer.convert_ids_to_tokens(list(columns.tokens)) == ordered
    assert list(columns.tokens) != sorted(columns.tokens)
    assert columns.codes[:, 0].tolist() == [sorted(numbers).index(number) for number in numbers]
    assert (columns.sizes, columns.tail_start) == ((7,), None)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tails_are_levels_of_one_code_behind_the_paths(tokenizer: str, tmp_path: Path) -> None:
    index = index_of({"x": ["<a_1>", "<b_7>"], "y": ["<a_3>", "<b_7>"], "z": ["<a_1>", "<b_2>"]}, tmp_path)
    loaded = TOKENIZERS[tokenizer](index.names)
    tokens = name_tokens(index, loaded, 10_000)
    tail = tail_tokens(UserPrompt(LAYOUT, loaded, str), SpelledItems(index, tokens))
    assert tail == [*loaded("<a_1>\n", add_special_tokens=False)["input_ids"][1:], loaded.eos_token_id]
    columns = code_columns(index, tokens, tail)
    assert columns.sizes == (2, 2, *(1 for _ in tail))
    assert columns.tail_start == (2, 2, *(0 for _ in tail))
    assert columns.tokens[4:] == tuple(tail)
    assert columns.codes.tolist() == [
        [0, 1, *(0 for _ in tail)],
        [1, 1, *(0 for _ in tail)],
        [0, 0, *(0 for _ in tail)],
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_column_leads_back_to_the_names_and_the_tail(data: Any) -> None:
    """Random paths of unequal lengths: the tokens of an item's columns are those of its names, then the tail."""
    names = [f"<{letter}_{number}>" for letter in "abc" for number in (1, 2, 10, 11)]
    level = [st.sampled_from([name for name in names if name[1] == letter]) for letter in "abc"]
    paths = data.draw(st.lists(st.one_of(st.tuples(*level), st.tuples(*level[:2])), min_size=1, max_size=12))
    tail = data.draw(st.sampled_from([[90, 91], [91], []]))
    flat = {name: place for place, name in enumerate(dict.fromkeys(name for path in paths for name in path))}
    numbers = np.full((len(paths), max(map(len, paths))), -1, dtype=np.int32)
    for row, path in enumerate(paths):
        numbers[row, : len(path)] = [flat[name] for name in path]
    index = Index(Path("index.json"), [str(item) for item in range(len(paths))], list(flat), numbers)
    token_of = {name: 89 - place for place, name in enumerate(names)}
    columns = code_columns(index, np.array([token_of[name] for name in index.names]), tail)
    offsets = np.concatenate([[0], np.cumsum(columns.sizes)])
    for path, codes in zip(paths, columns.codes.tolist(), strict=True):
        spelled = [columns.tokens[offsets[place] + code] for place, code in enumerate(codes) if code >= 0]
        assert spelled == [*map(token_of.__getitem__, path), *tail]
        assert all(code < 0 for code in codes[len(path) + len(tail) :])
    for place, start in enumerate(columns.tail_start or ()):
        codes = columns.tokens[offsets[place] : offsets[place] + start]
        assert set(columns.tokens[offsets[place] + start : offsets[place + 1]]) <= set(tail)
        assert not set(codes) & set(tail)
    if tail:  # which separates a path from one that it begins
        catalogue = Catalogue.build(index.ids, columns.codes, columns.sizes, tail_start=columns.tail_start)
        assert catalogue.items == len(paths)


def test_a_missing_token_is_named(tmp_path: Path) -> None:
    index = index_of({"x": ["<a_1>", "<b_7>"]}, tmp_path)
    with pytest.raises(ImportingError, match=r"code '<b_7>': the tokenizer has no such token, it encodes to '<', 'b"):
        name_tokens(index, bpe_tokenizer(["<a_1>"]), 10_000)


def test_a_name_that_encodes_to_other_tokens_is_refused(tmp_path: Path) -> None:
    """`unk` is a token of the vocabulary, and a piece of words is not its own text."""
    index = index_of({"x": ["<unk>"]}, tmp_path)
    with pytest.raises(ImportingError, match="code '<unk>': it does not encode to its own token"):
        name_tokens(index, TOKENIZERS["unigram"]([]), 10_000)
    tokenizer = bpe_tokenizer([])
    word = next(
        name for name in tokenizer.get_vocab() if len(name) > 2 and name.startswith("Ġ")
    )  # a word after a blank
    index = index_of({"x": [word]}, tmp_path)
    with pytest.raises(ImportingError, match="it does not encode to its own token"):
        name_tokens(index, tokenizer, 10_000)


def test_two_names_of_one_token_are_refused(tmp_path: Path) -> None:
    class Twice:
        """A tokenizer whose vocabulary gives two names one id."""

        unk_token_id = None

        def get_vocab(self) -> dict[str, int]:
            return {"<a_1>": 5, "<a_01>": 5}

        def __call__(self, names: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": [[5] for _ in names]}

    index = index_of({"x": ["<a_1>"], "y": ["<a_01>"]}, tmp_path)
    with pytest.raises(ImportingError, match="codes '<a_1>' and '<a_01>' have one token, 5"):
        name_tokens(index, Twice(), 10_000)


def test_a_token_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    index = index_of({"x": ["<a_1>"]}, tmp_path)
    tokenizer = bpe_tokenizer(["<a_1>"])
    rows = len(tokenizer) - 1
    with pytest.raises(ImportingError, match=f"code '<a_1>': token {rows}, but the embedding has {rows} rows"):
        name_tokens(index, tokenizer, rows)


def test_a_letter_at_two_positions_is_refused(tmp_path: Path) -> None:
    index = index_of({"x": ["<a_1>", "<b_7>"], "y": ["<b_2>", "<a_3>"]}, tmp_path)
    with pytest.raises(ImportingError, match="'<b_2>' is code 1 of a path and '<b_7>' is code 2 of one"):
        check_labels(index)
    check_labels(index_of({"x": ["<1>", "<7>"], "y": ["<7>", "<1>"]}, tmp_path))  # levels may share plain numbers


def test_a_tail_that_is_a_code_is_refused(tmp_path: Path) -> None:
    index = index_of({"x": ["<a_1>", "<b_7>"], "y": ["<a_1>"]}, tmp_path)
    with pytest.raises(ImportingError, match="token 8 is a code and a token of the tail in one place"):
        code_columns(index, np.array([7, 8]), [8])


def test_a_tail_needs_an_end_of_sequence_token(tmp_path: Path) -> None:
    index = index_of({"x": ["<a_1>"]}, tmp_path)
    tokenizer = bpe_tokenizer(["<a_1>"])
    tokenizer.eos_token = None
    spelled = SpelledItems(index, name_tokens(index, tokenizer, 10_000))
    with pytest.raises(ImportingError, match="tail: the tokenizer has no end-of-sequence token"):
        tail_tokens(UserPrompt(LAYOUT, tokenizer, str), spelled)
