"""Fields of users in prompts, such as an age, each with a closed set of values.

Serving has no tokenizer. So a bundle holds the tokens of every value, and a request names values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from atspeed.engine.errors import EngineError

Part = Literal["prefix", "suffix"]
UserFields = Mapping[str, str]
"""The value of each field of a user, by name."""
_SHOWN_VALUES = 10  # of a message


class UserFieldError(EngineError):
    """A request whose fields are not those of the prompt. problems: what is wrong, by field."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"user_fields.{name}: {problem}" for name, problem in problems.items()))
        self.problems = dict(problems)


class PromptField(BaseModel):
    """A field of users: its place in a prompt, and the tokens of each value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    part: Part
    at: NonNegativeInt
    """The tokens of the part that stand before the value, other values left out."""
    values: dict[str, tuple[NonNegativeInt, ...]] = Field(min_length=1)
    default: str | None = Field(default=None, exclude_if=lambda default: default is None)
    """The value of a request that does not name the field; without it such a request is refused."""

    @model_validator(mode="after")
    def _default_is_a_value(self) -> PromptField:
        if self.default is not None and self.default not in self.values:
            raise ValueError(f"default: {self.default!r} is none of the values")
        return self

    @property
    def longest(self) -> int:
        """Return the most tokens of a value."""
        return max(map(len, self.values.values()))

    def tokens(self, given: UserFields) -> tuple[int, ...]:
        """Return the tokens of a request's value, or of the default. given: see `check_user_fields`."""
        return self.values[given[self.name] if self.default is None else given.get(self.name, self.default)]

    def problem(self, given: UserFields) -> str:
        """Return why a request cannot be served; empty if it can. The value itself is not repeated: it may be personal."""
        shown = ", ".join(list(self.values)[:_SHOWN_VALUES]) + (", ..." if len(self.values) > _SHOWN_VALUES else "")
        if self.name in given:
            return "" if given[self.name] in self.values else f"must be one of the bundle's values: {shown}"
        return "" if self.default is not None else f"is missing, and the bundle's prompts hold it; its values: {shown}"


def check_user_fields(fields: Sequence[PromptField], given: UserFields) -> None:
    """Raise UserFieldError, with every problem, unless the values of a request fit the fields of a prompt."""
    found = {field.name: problem for field in fields if (problem := field.problem(given))}
    names = ", ".join(field.name for field in fields) or "none"
    unknown = sorted(given.keys() - {field.name for field in fields})
    found |= dict.fromkeys(unknown, f"is no field of the bundle's prompts, which hold {names}")
    if found:
        raise UserFieldError(found)


def draft_problem(draft: Sequence[PromptField], target: Sequence[PromptField]) -> str:
    """Return why a draft cannot read some user whom the target's prompts can hold; empty if it reads all."""
    of_target = {field.name: field for field in target}
    for field in draft:
        same = of_target.get(field.name)
        if field.default is None and (same is None or same.default is not None):
            return f"{field.name}: must have a default, since a request need not name it"
        if same is not None and not same.values.keys() <= field.values.keys():
            return f"{field.name}: lacks a value that the target's has"
    return ""


def with_values(part: Part, tokens: Sequence[int], fields: Sequence[PromptField], given: UserFields) -> Iterator[int]:
    """Yield the tokens of a part of a prompt, with the values of a request at their places."""
    start = 0
    for field in fields:
        if field.part == part:
            yield from tokens[start : field.at]
            yield from field.tokens(given)
            start = field.at
    yield from tokens[start:]


def mixed_values(fields: Sequence[PromptField], number: int) -> dict[str, str]:
    """Return one value of each field; consecutive numbers give all combinations."""
    chosen = dict[str, str]()
    for field in fields:
        number, place = divmod(number, len(field.values))
        chosen[field.name] = list(field.values)[place]
    return chosen
