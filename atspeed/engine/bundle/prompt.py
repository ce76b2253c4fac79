"""The prompt template: from a history to token ids, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from atspeed.engine.bundle.user_fields import Part, PromptField, UserFields, mixed_values, with_values

_PARTS: tuple[Part, Part] = ("prefix", "suffix")


class TextsEntry(BaseModel):
    """The texts of items in prompts, which are files of the bundle (atspeed.engine.bundle.item_texts)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    catalogue: str
    """The version of the catalogue whose items they are."""
    digest: str
    """The hash of all texts."""
    longest: PositiveInt
    """The most tokens of a text."""
    usual: PositiveInt
    """The median of their tokens."""


class PromptTemplate(BaseModel):
    """The form of a prompt: prefix + item (+ separator + item)* + suffix, with values of users in prefix and suffix.

    An item is the tokens of its codes, without its tail, or those of its text. A prompt holds the newest items of a history.
    Beyond `max_items` items the oldest are dropped, `drop_block` at a time. So the beginning of the prompt, and its cached KV,
    stays the same for `drop_block` new items. `drop_block = 1` is the sliding window of the AtSpeed paper. Places, and so the
    numbers of items, count from the oldest item of the window.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: tuple[NonNegativeInt, ...]
    """Tokens before the history; at least a BOS, unless the model has an encoder."""
    separator: tuple[NonNegativeInt, ...] = ()
    """Tokens between two items."""
    suffix: tuple[NonNegativeInt, ...] = ()
    """Tokens after the history."""
    max_items: PositiveInt = 20
    drop_block: PositiveInt = 1
    # The fields below are not written when they have their default: a bundle without them keeps its version.
    separators: tuple[tuple[NonNegativeInt, ...], ...] = Field(default=(), exclude_if=lambda separators: not separators)
    """Tokens before the second item and each later one, where they change with the place, as numbers do."""
    texts: TextsEntry | None = Field(default=None, exclude_if=lambda texts: texts is None)
    """The texts of items, if an item is more than its codes."""
    user_fields: tuple[PromptField, ...] = Field(default=(), exclude_if=lambda fields: not fields)
    """The fields of users in prefix and suffix, which do not hold their values, in the order of their places."""

    @model_validator(mode="after")
    def _a_separator_per_place(self) -> PromptTemplate:
        if self.separators and (self.separator or len(self.separators) != self.max_items - 1):
            raise ValueError(f"separators: must be {self.max_items - 1}, one less than max_items, without a separator")
        return self

    @model_validator(mode="after")
    def _block_within_window(self) -> PromptTemplate:
        if self.drop_block > self.max_items:
            raise ValueError(f"drop_block: {self.drop_block} is larger than max_items, {self.max_items}")
        return self

    @model_validator(mode="after")
    def _fields_in_order(self) -> PromptTemplate:
        places = [(field.part, field.at) for field in self.user_fields]
        if places != sorted(places) or len({field.name for field in self.user_fields}) < len(places):
            raise ValueError("user_fields: must have different names, and stand in the order of their places")
        for field in self.user_fields:
            if field.at > len(self.part(field.part)):
                raise ValueError(f"user_fields: {field.name}: stands behind the end of the {field.part}")
        return self

    def part(self, part: Part) -> tuple[int, ...]:
        """Return the tokens of prefix or suffix, without values of users."""
        return self.prefix if part == "prefix" else self.suffix

    def window_start(self, items: int) -> int:
        """Return the index of the first item in the prompt, for a history of `items` items."""
        excess = max(0, items - self.max_items)
        return -(-excess // self.drop_block) * self.drop_block

    @property
    def fixed_tokens(self) -> tuple[int, ...]:
        """Return the tokens of every segment, but those of items: first the prefix, last the values of users."""
        between = (token for each in (self.separator, *self.separators) for token in each)
        values = (token for field in self.user_fields for value in field.values.values() for token in value)
        return (*self.prefix, *between, *self.suffix, *values)

    @property
    def shared_prefix(self) -> tuple[int, ...]:
        """Return the tokens at the beginning of every user's prompt: those before the first value of a user."""
        return self.prefix[: min((field.at for field in self.user_fields if field.part == "prefix"), default=None)]

    def before(self, place: int) -> tuple[int, ...]:
        """Return the tokens between the item at a place, from 1 on, and the item before it."""
        return self.separators[place - 1] if self.separators else self.separator

    def tokens(
        self, items: Sequence[npt.NDArray[np.int64]], user_fields: UserFields | None = None
    ) -> npt.NDArray[np.int64]:
        """Return the prompt of a window of items, int64 [prompt length].

        items: each as its tokens. user_fields: the values of the user's fields, which `check_user_fields` has passed.
        """
        before, behind = (
            tuple(with_values(part, self.part(part), self.user_fields, user_fields or {})) for part in _PARTS
        )
        tokens = list(before)
        for place, item in enumerate(items):
            if place:
                tokens += self.before(place)
            tokens += item.tolist()
        tokens += behind
        return np.array(tokens, dtype=np.int64)

    def mixed(self, number: int) -> dict[str, str]:
        """Return values of all fields of users; consecutive numbers give all combinations."""
        return mixed_values(self.user_fields, number)

    def sample(self) -> npt.NDArray[np.int64]:
        """Return the prompt of no item, for measurements, int64 [prompt length]."""
        return self.tokens([], self.mixed(0))

    def item_stride(self, codes: int) -> int:
        """Return the tokens from the beginning of a usual item to that of the next. codes: those of an item in a prompt."""
        usual = self.texts.usual if self.texts else codes
        return usual + (len(self.before(1)) if self.max_items > 1 else 0)

    def max_tokens(self, codes: int) -> int:
        """Return the most tokens that a prompt may have. codes: those of the longest item."""
        longest = self.texts.longest if self.texts else codes
        between = sum(len(self.before(place)) for place in range(1, self.max_items))
        values = sum(field.longest for field in self.user_fields)
        return len(self.prefix) + len(self.suffix) + values + self.max_items * longest + between
