"""Fields of users in a prompt template: places, values, refusals, and what all users share."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.bundle.user_fields import Part, PromptField, UserFieldError, check_user_fields, draft_problem

PARTS: tuple[Part, Part] = ("prefix", "suffix")
AGE = PromptField(name="age", part="prefix", at=1, values={"young": (10,), "old": (11, 12)})
SEX = PromptField(name="sex", part="prefix", at=2, values={"F": (20,), "M": ()}, default="F")
DAY = PromptField(name="day", part="suffix", at=0, values={"Sunday": (30, 31)})
TEMPLATE = PromptTemplate(prefix=(1, 2), separator=(3,), suffix=(4,), max_items=2, user_fields=(AGE, SEX, DAY))


def test_values_stand_at_their_places() -> None:
    items = [np.array([7, 8]), np.array([9])]
    given = {"age": "old", "sex": "M", "day": "Sunday"}
    assert TEMPLATE.tokens(items, given).tolist() == [1, 11, 12, 2, 7, 8, 3, 9, 30, 31, 4]
    assert TEMPLATE.tokens([], {"age": "young", "day": "Sunday"}).tolist() == [1, 10, 2, 20, 30, 31, 4]


@given(st.data())
def test_a_prompt_is_its_text_with_each_value_in_place(data: st.DataObject) -> None:
    """Any number of fields in both parts, some at one place, against a template of words."""
    tokens = st.lists(st.integers(0, 9), max_size=3)
    prefix, suffix = (1, *data.draw(tokens)), tuple(data.draw(tokens))
    words: dict[Part, list[int | str]] = {"prefix": [*prefix], "suffix": [*suffix]}
    fields = []
    for number in range(data.draw(st.integers(0, 4))):
        part = data.draw(st.sampled_from(PARTS))
        words[part].insert(data.draw(st.integers(0, len(words[part]))), f"f{number}")
    for part in PARTS:
        for place, word in enumerate(words[part]):
            if isinstance(word, str):
                values = data.draw(st.dictionaries(st.sampled_from("abc"), tokens.map(tuple), min_size=1))
                at = sum(isinstance(before, int) for before in words[part][:place])
                fields.append(PromptField(name=word, part=part, at=at, values=values))
    template = PromptTemplate(prefix=prefix, suffix=suffix, user_fields=tuple(fields))
    given = {field.name: data.draw(st.sampled_from(sorted(field.values))) for field in fields}
    of = {field.name: field.values[given[field.name]] for field in fields}
    item = [50, 51]
    expected = [
        token
        for word in (*words["prefix"], *item, *words["suffix"])
        for token in (of[word] if isinstance(word, str) else (word,))
    ]
    assert template.tokens([np.array(item)], given).tolist() == expected
    assert len(expected) <= template.max_tokens(2)
    assert set(expected) <= {*template.fixed_tokens, *item}
    shared = template.shared_prefix
    assert tuple(expected[: len(shared)]) == shared
    assert len(shared) == next((at for at, word in enumerate(words["prefix"]) if isinstance(word, str)), len(prefix))


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({"day": "Sunday"}, {"age": "is missing, and the bundle's prompts hold it; its values: young, old"}),
        ({"age": "42", "day": "Sunday"}, {"age": "must be one of the bundle's values: young, old"}),
        (
            {"age": "old", "day": "Sunday", "name": "Ada"},
            {"name": "is no field of the bundle's prompts, which hold age, sex, day"},
        ),
        ({"sex": "?", "day": "Sunday", "age": "old"}, {"sex": "must be one of the bundle's values: F, M"}),
    ],
)
def test_what_does_not_fit_is_named_without_the_users_value(given: dict[str, str], problems: dict[str, str]) -> None:
    with pytest.raises(UserFieldError) as caught:
        check_user_fields(TEMPLATE.user_fields, given)
    assert caught.value.problems == problems
    assert not {"42", "Ada"} & set(str(caught.value).split())


def test_numbers_give_all_combinations() -> None:
    found = [tuple(TEMPLATE.mixed(number).values()) for number in range(4)]
    assert sorted(found) == sorted(product(AGE.values, SEX.values, DAY.values))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((SEX, AGE), "must have different names, and stand in the order of their places"),
        ((AGE, AGE), "must have different names"),
        ((AGE.model_copy(update={"at": 3}),), "age: stands behind the end of the prefix"),
    ],
)
def test_fields_must_fit_the_template(fields: tuple[PromptField, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PromptTemplate(prefix=(1, 2), user_fields=fields)
    with pytest.raises(ValidationError, match="none of the values"):
        PromptField(name="age", part="prefix", at=0, values={"old": (1,)}, default="young")


def test_a_template_without_fields_is_written_as_before() -> None:
    """So that a bundle keeps its version."""
    assert "user_fields" not in PromptTemplate(prefix=(1,)).model_dump(mode="json")
    assert PromptTemplate.model_validate_json(TEMPLATE.model_dump_json()) == TEMPLATE


fields_of_models = st.dictionaries(
    st.sampled_from("pq"), st.tuples(st.sets(st.sampled_from("abc"), min_size=1), st.booleans())
).map(
    lambda drawn: tuple(
        PromptField(
            name=name,
            part="prefix",
            at=0,
            values=dict.fromkeys(sorted(values), (1,)),
            default=min(values) if has else None,
        )
        for name, (values, has) in sorted(drawn.items())
    )
)


@given(fields_of_models, fields_of_models)
def test_a_draft_is_refused_exactly_if_a_request_for_the_target_cannot_be_read_by_it(
    draft: tuple[PromptField, ...], target: tuple[PromptField, ...]
) -> None:
    """Each request that the target takes, with the values that the draft's prompts hold."""

    def taken(fields: tuple[PromptField, ...], values: dict[str, str]) -> bool:
        try:
            check_user_fields(fields, values)
        except UserFieldError:
            return False
        return True

    held = {field.name for field in draft}
    requests = (
        {name: one for name, one in zip("pq", drawn, strict=True) if one} for drawn in product(["", *"abc"], repeat=2)
    )
    read = all(
        taken(draft, {name: one for name, one in request.items() if name in held})
        for request in requests
        if taken(target, request)
    )
    assert (draft_problem(draft, target) == "") is read
