"""Training sequences are those that serving asks: prompts, labels and windows."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.item_texts import ItemTexts, TokenRows
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.training.sequences import IGNORED, Batch, Sequencer, Spelling, WindowBatches, index_histories
from tests.bundles import SPECIALS, shared_tokens
from tests.catalogues import tailed_catalogue

ITEMS, LEVELS, CODES = 30, 3, 5
CATALOGUE = Catalogue.build(
    [f"i{item}" for item in range(ITEMS)],
    np.random.default_rng(0).integers(CODES, size=(ITEMS, LEVELS)),
    [CODES] * LEVELS,
)


def sequencer(*, predict_first: bool = True, **template: Any) -> Sequencer:
    shape: dict[str, Any] = {"prefix": (1,), "max_items": 6, "drop_block": 2}
    prompt = PromptTemplate(**(shape | template))
    # Not in the order of the columns, so that a mix-up of columns and tokens shows.
    tokens = tuple(range(2 + LEVELS * CODES, 2, -1))
    spelling = Spelling(code_tokens=tokens, prompt=prompt, pad_token=0, vocab_size=40)
    return Sequencer.of(spelling, CATALOGUE, predict_first)


def history(length: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(length).integers(ITEMS, size=length)


def test_item_tokens_are_those_of_the_items_code_columns() -> None:
    made = sequencer()
    for item in range(ITEMS):
        codes = CATALOGUE.codes[item]
        expected = [made.spelling.code_tokens[level * CODES + code] for level, code in enumerate(codes)]
        assert made.item_tokens[item].tolist() == expected


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 8, 9, 20])
def test_the_prompt_is_the_templates_of_the_newest_items(length: int) -> None:
    """drop_block 2 of at most 6: histories of 7 and 8 items show 5 and 6, as the serving window does."""
    made, items = sequencer(suffix=(39,)), history(length)
    start = made.spelling.prompt.window_start(length)
    shown = [made.item_tokens[item] for item in items[start:]]
    np.testing.assert_array_equal(made.prompt(items), made.spelling.prompt.tokens(shown))


@settings(max_examples=100)
@given(st.integers(1, 7))
def test_every_label_follows_a_prompt_of_serving_time(length: int) -> None:
    """Up to where an item's labels begin, the sequence is exactly the prompt that serving builds for the items before it."""
    made, items = sequencer(), history(length)
    example = made.example(items)
    np.testing.assert_array_equal(example.labels[1:], example.tokens[1:])
    for index in range(length):
        begins = 1 + index * LEVELS
        np.testing.assert_array_equal(example.tokens[:begins], made.prompt(items[:index]))
        np.testing.assert_array_equal(example.labels[begins : begins + LEVELS], made.item_tokens[items[index]])


@settings(max_examples=100)
@given(st.integers(0, 30))
def test_an_evaluation_sees_the_serving_prompt_and_predicts_the_item_alone(length: int) -> None:
    made, items = sequencer(separator=(37, 38), suffix=(39,)), history(length)
    example = made.last_of(items, 3)
    np.testing.assert_array_equal(example.tokens[:-LEVELS], made.prompt(items))
    assert (example.labels[:-LEVELS] == IGNORED).all()
    np.testing.assert_array_equal(example.labels[-LEVELS:], made.item_tokens[3])


def test_only_codes_are_labels_under_a_template_in_words() -> None:
    made, items = sequencer(prefix=(31, 32), separator=(37, 38), suffix=(39, 36), predict_first=False), history(4)
    example = made.example(items)
    labelled = example.labels[example.labels != IGNORED]
    np.testing.assert_array_equal(labelled, made.item_tokens[items[1:]].ravel())
    np.testing.assert_array_equal(example.tokens[example.labels != IGNORED], labelled)


def test_prompts_hold_no_tail_and_the_next_item_is_predicted_with_its_own() -> None:
    """Items of one to three codes, each with a scored tail."""
    catalogue = tailed_catalogue(ITEMS, (4, 3, 3), seed=1)
    tokens = shared_tokens(catalogue)
    prompt = PromptTemplate(prefix=(1,), separator=(30,), suffix=(31,), max_items=6)
    spelling = Spelling(code_tokens=tokens, prompt=prompt, pad_token=0, vocab_size=40)
    made, items = Sequencer.of(spelling, catalogue, predict_first=True), history(5)
    np.testing.assert_array_equal(made.prompt(items), prompt.tokens(catalogue.spelled_tokens(items, tokens)))
    *context, last = catalogue.spelled_tokens(items, tokens)
    tail = SPECIALS
    example = made.example(items)
    np.testing.assert_array_equal(example.tokens, [*prompt.tokens(context), *last, tail])
    labelled = example.labels[example.labels != IGNORED]
    np.testing.assert_array_equal(labelled, np.concatenate([*context, last, [tail]]))
    np.testing.assert_array_equal(example.tokens[example.labels != IGNORED], labelled)


def test_texts_of_items_are_those_of_serving_and_are_not_predicted() -> None:
    """A draft is distilled on a target's own prompts: numbered ones with texts, of which the last has another end."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(5, 9, size=length).astype(np.int32) for length in rng.integers(1, 6, size=2 * CATALOGUE.items)]
    texts = ItemTexts(TokenRows.of(rows[: CATALOGUE.items]), TokenRows.of(rows[CATALOGUE.items :]))
    spelling = sequencer().spelling
    prompt = PromptTemplate(
        prefix=(1,), suffix=(2,), max_items=3, separators=((3,), (4, 4)), texts=texts.entry(CATALOGUE.version)
    )
    made = Sequencer.of(spelling.model_copy(update={"prompt": prompt}), CATALOGUE, True, texts)
    items = history(5)
    first, second, third = items[-3:].tolist()
    expected = [1, *rows[first], 3, *rows[second], 4, 4, *rows[CATALOGUE.items + third], 2]
    assert made.prompt(items).tolist() == expected
    example = made.last_of(items[:-1], int(items[-1]))
    codes = made.item_tokens[items[-1]]
    np.testing.assert_array_equal(example.labels[example.labels != IGNORED], codes[codes >= 0])


def test_longest_sequence_fits_the_longest_prompt() -> None:
    made = sequencer()
    assert len(made.example(history(made.window)).tokens) == made.spelling.prompt.max_tokens(LEVELS) + LEVELS


@settings(max_examples=100)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 3))
def test_windows_predict_every_item_once_per_epoch(lengths: list[int], epoch: int) -> None:
    made = sequencer()
    histories = [history(length) for length in lengths]
    batches = WindowBatches(made, histories, batch_size=3, item_dropout=0.0, seed=1)(epoch)
    labels = np.concatenate([batch.labels.numpy().ravel() for batch in batches] or [np.empty(0, np.int64)])
    expected = np.concatenate([made.item_tokens[items].ravel() for items in histories])
    np.testing.assert_array_equal(np.sort(labels[labels != IGNORED]), np.sort(expected))


def test_epochs_differ_and_are_reproducible() -> None:
    batches = WindowBatches(sequencer(), [history(30), history(25)], batch_size=2, item_dropout=0.2, seed=1)

    def tokens(epoch: int) -> list[list[list[int]]]:
        return [batch.tokens.tolist() for batch in batches(epoch)]

    assert tokens(0) == tokens(0) != tokens(1)


def test_item_dropout_leaves_items_out() -> None:
    whole = WindowBatches(sequencer(), [history(40)] * 20, batch_size=8, item_dropout=0.0, seed=1)(0)
    dropped = WindowBatches(sequencer(), [history(40)] * 20, batch_size=8, item_dropout=0.5, seed=1)(0)

    def labels(batches: list[Batch]) -> int:
        return sum(int((batch.labels != IGNORED).sum()) for batch in batches)

    assert 0.3 < labels(dropped) / labels(whole) < 0.7


def test_histories_become_item_indices() -> None:
    (indices,) = index_histories(CATALOGUE, {"u": ("i3", "i7")})
    assert [CATALOGUE.id_of(int(index)) for index in indices] == ["i3", "i7"]
