"""Reads fields of users from a file, and their tokens from rendered prompts.

A field has a closed set of values: those of the file, and its default. Each value is rendered with all others unchanged. What
these prompts have in common stands before and behind the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.item_ids import MAX_ID_BYTES, shown
from atspeed.engine.bundle.item_texts import TokenRows
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.bundle.user_fields import Part, PromptField
from atspeed.engine.files.lines import parse_json, read_lines
from atspeed.importing.errors import ImportingError
from atspeed.importing.index import read_json
from atspeed.importing.item_texts import common_ends
from atspeed.importing.layouts import ITEM, PromptLayout
from atspeed.importing.template import difference
from atspeed.importing.user_prompt import UserPrompt

MAX_VALUES = 1_000  # of a field; more are no closed set
_PARTS: tuple[Part, Part] = ("prefix", "suffix")
_COMBINATIONS = 20_000  # of values, rendered; of more, some are drawn


@dataclass(frozen=True)
class FieldValues:
    """The values of users' fields.

    Attributes:
        users: the distinct users of the file, each with the value of every field.
        values: the distinct values of each field, in their order in the file.
    """

    users: list[dict[str, str]]
    values: dict[str, list[str]]

    @property
    def first(self) -> dict[str, str]:
        """Return the first value of each field."""
        return {name: values[0] for name, values in self.values.items()}


def read_user_fields(path: Path | None, layout: PromptLayout) -> FieldValues:
    """Read the values of the fields that a prompt holds. Raises ImportingError naming the user or line, and the field.

    path: a JSON object by user, or JSON lines; None only for a prompt without such fields.
    """
    names = layout.user_fields
    if path is None and names:
        raise ImportingError(f"prompt: {{{names[0]}}} is a field of users; --user-fields gives a file that has it")
    if path is not None and not names:
        raise ImportingError(f"{path}: the prompt holds no field of users, such as {{age}}")
    if path is None:
        return FieldValues([{}], {})
    found = [_values(path, place, row, layout) for place, row in _rows(path)]
    if not found:
        raise ImportingError(f"{path}: holds no user")
    users = [dict(zip(names, row, strict=True)) for row in dict.fromkeys(tuple(user.values()) for user in found)]
    values = {name: list(dict.fromkeys(user[name] for user in users)) for name in names}
    for name, default in layout.user_defaults.items():
        values[name] = list(dict.fromkeys([*values[name], default]))
    for name, distinct in values.items():
        if len(distinct) > MAX_VALUES:
            raise ImportingError(
                f"{path}: {name} has {len(distinct):,} values; a bundle holds at most {MAX_VALUES:,}, so only fields with a "
                "closed set of values can be served"
            )
    return FieldValues(users, values)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".json":
        content = read_json(path)
        if not isinstance(content, dict):
            raise ImportingError(f"{path}: not an object with a user per key")
        yield from ((f"user {shown(user)}", row) for user, row in content.items())
        return
    for number, line in read_lines(path):
        try:
            yield f"line {number}", parse_json(line)
        except ValueError as error:
            raise ImportingError(f"{path}: line {number}: {error}") from error


def _values(path: Path, place: str, row: Any, layout: PromptLayout) -> dict[str, str]:
    if not isinstance(row, dict):
        raise ImportingError(f"{path}: {place}: not an object with the fields of a user")
    found = {}
    for name in layout.user_fields:
        value = row.get(name, layout.user_defaults.get(name))
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise ImportingError(f"{path}: {place}: no text or whole number {name}, which the prompt holds")
        if len(str(value).encode()) > MAX_ID_BYTES:
            raise ImportingError(f"{path}: {place}: {name} has more than {MAX_ID_BYTES} bytes")
        found[name] = str(value)
    return found


def split_user_fields(
    user: UserPrompt, template: PromptTemplate, fields: FieldValues, history: Sequence[str], items: Sequence[Int64]
) -> PromptTemplate:
    """Cut the values of users out of a template that was read with the first ones.

    Args:
        user: the prompt.
        template: the template with the first value of each field.
        fields: all values.
        history: a window of item ids.
        items: the tokens of its items in the prompt.

    Raises ImportingError when prompts are not made of values and of tokens between them.
    """
    whole = len(template.tokens(items))
    slots = [_slot(user, template, fields, name, history, whole) for name in fields.values]
    slots.sort(key=lambda slot: (slot.part, slot.start, slot.end))
    _check_neighbours(slots, template, user.layout)
    cut = {str(part): _without(template.part(part), [slot for slot in slots if slot.part == part]) for part in _PARTS}
    made = [_field(slot, slots, user.layout).model_dump() for slot in slots]
    done = PromptTemplate.model_validate({**template.model_dump(), **cut, "user_fields": made})
    _check_combinations(user, done, fields, history, items)
    return done


@dataclass(frozen=True)
class _Slot:
    """The tokens of a field in a part of a prompt with the first value: start to end. values: those of every value."""

    name: str
    part: Part
    start: int
    end: int
    values: dict[str, tuple[int, ...]]


def _slot(
    user: UserPrompt, template: PromptTemplate, fields: FieldValues, name: str, history: Sequence[str], whole: int
) -> _Slot:
    """Find a field. whole: the tokens of the history's prompt with the first values."""
    values = fields.values[name]
    given = [fields.first | {name: value} for value in values]
    rendered = [row for batch in user.batches([history] * len(given), given) for row in batch]
    before, behind = common_ends(TokenRows.of(np.asarray(row, dtype=np.int32) for row in rendered))
    texts = {value: tuple(row[before : len(row) - behind]) for value, row in zip(values, rendered, strict=True)}
    end, suffix = whole - behind, whole - len(template.suffix)
    if end <= len(template.prefix):
        return _Slot(name, "prefix", before, end, texts)
    if before >= suffix:
        return _Slot(name, "suffix", before - suffix, end - suffix, texts)
    raise _not_apart(f"{{{name}}} changes the tokens of items beside it")


def _check_neighbours(slots: Sequence[_Slot], template: PromptTemplate, layout: PromptLayout) -> None:
    """Raise ImportingError when a field shares tokens with another one, or stands beside a text of items that it may change."""
    for before, behind in pairwise(slots):
        if before.part == behind.part and behind.start < before.end:
            raise _not_apart(f"{{{before.name}}} and {{{behind.name}}} change the same tokens")
    for slot in slots:
        of_text = not (layout.item.startswith(ITEM) if slot.part == "prefix" else layout.item.endswith(ITEM))
        if of_text and (slot.end == len(template.prefix) if slot.part == "prefix" else slot.start == 0):
            raise _not_apart(f"no token stands between {{{slot.name}}} and the text of an item")


def _without(tokens: Sequence[int], slots: Sequence[_Slot]) -> tuple[int, ...]:
    taken = {place for slot in slots for place in range(slot.start, slot.end)}
    return tuple(token for place, token in enumerate(tokens) if place not in taken)


def _field(slot: _Slot, slots: Sequence[_Slot], layout: PromptLayout) -> PromptField:
    before = sum(
        other.end - other.start
        for other in slots
        if other.part == slot.part and other.end <= slot.start and other != slot
    )
    default = layout.user_defaults.get(slot.name)
    return PromptField(name=slot.name, part=slot.part, at=slot.start - before, values=slot.values, default=default)


def _check_combinations(
    user: UserPrompt, template: PromptTemplate, fields: FieldValues, history: Sequence[str], items: Sequence[Int64]
) -> None:
    """Compare prompts of all combinations of values, or of many: one value may change another. Raises ImportingError."""
    count = int(np.prod([len(values) for values in fields.values.values()], dtype=float))
    drawn = np.random.default_rng(0).integers(min(count, 2**62), size=_COMBINATIONS).tolist()
    mixed = [template.mixed(number) for number in (range(count) if count <= _COMBINATIONS else drawn)]
    rendered = (row for batch in user.batches([history] * len(mixed), mixed) for row in batch)
    for values, row in zip(mixed, rendered, strict=True):
        expected = template.tokens(items, values).tolist()
        if row != expected:
            named = ", ".join(f"{name} {shown(value)}" for name, value in values.items())
            raise ImportingError(f"prompt: {named}: {difference(user, row, expected)}")


def _not_apart(reason: str) -> ImportingError:
    return ImportingError(f"prompt: the prompt is not made of segments that stay what they are: {reason}")
