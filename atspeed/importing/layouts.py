"""Prompt layouts: the texts around a history, as the authors of a model write them.

A layout is data. `LAYOUTS` holds those of known projects; a file holds any other one (`read_layout`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from atspeed.importing.errors import ImportingError

HISTORY, ITEM, NUMBER, EOS = "{history}", "{item}", "{number}", "{eos}"
# A name, a number or a field between braces, also between the two of Jinja: formatting would put something there.
_PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}|\{\w[\w.\-]*(?:\[\w*\])?\}")
_FIELD = re.compile(r"\{([^\W\d]\w*)\}")
_IN_SEGMENT = re.compile(r"\{(?:user\.)?([^\W\d]\w*)\}")
_NO_USER_FIELDS = frozenset({HISTORY, ITEM, NUMBER, EOS})


class PromptLayout(BaseModel):
    """The texts of a prompt and of what is scored behind an item's codes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    segments: tuple[str, ...] = Field(min_length=1)
    """Texts that are tokenised apart. One of them holds `{history}`. Any other name, such as `{age}` or `{user.age}`, stands for
    a field of the user."""
    separator: str = ", "
    """The text between two items."""
    item: str = ITEM
    """The text of an item. `{item}` stands for its code tokens, `{number}` for its place in the prompt, from 1 on, and any other
    name for a field of the item, such as `{title}`."""
    tail: str = ""
    """The text that is scored behind the codes; `{eos}` stands for the end-of-sequence token."""
    max_items: Annotated[PositiveInt, Field(strict=True)] = 20
    """The newest items that a prompt holds."""
    user_defaults: dict[str, str] = Field(default={}, exclude_if=lambda defaults: not defaults)
    """The values of users' fields for requests that do not name them; without one such a request is refused."""
    code_names: tuple[str, ...] = ()
    """The token of a code per level, such as `<s_a_{}>`, for an index of numbers."""

    @model_validator(mode="after")
    def _places(self) -> PromptLayout:
        for field, texts in (
            ("segments", self.segments),
            ("separator", (self.separator,)),
            ("tail", (self.tail.replace(EOS, ""),)),
        ):
            found = [place for text in texts for place in _PLACEHOLDER.findall(text)]
            if other := next((place for place in found if field != "segments" or not _in_segments(place)), None):
                raise ValueError(
                    f"{field}: {other} would change from prompt to prompt, which no bundle can hold; "
                    "only `item` may name fields of items, and `segments` those of users"
                )
            if field == "segments" and found.count(HISTORY) != 1:
                raise ValueError(f"{field}: must hold {HISTORY} exactly once")
        names = [name for segment in self.segments for name in _IN_SEGMENT.findall(segment)]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"segments: {{{repeated}}} stands more than once")
        self._check_item()
        if unknown := sorted(self.user_defaults.keys() - set(self.user_fields)):
            raise ValueError(f"user_defaults: {unknown[0]} is no field in segments")
        if EOS in self.tail.removesuffix(EOS):
            raise ValueError(f"tail: {EOS} must be its end")
        for name in self.code_names:
            if name.count("{}") != 1:
                raise ValueError(f"code_names: {name!r} must hold {{}} exactly once")
        return self

    def _check_item(self) -> None:
        """Raise ValueError unless an item's text holds its codes or a field, each place once."""
        found = [place for place in _PLACEHOLDER.findall(self.item) if place != NUMBER]
        if wrong := next((place for place in found if not _FIELD.fullmatch(place)), None):
            raise ValueError(f"item: {wrong} is no field of an item")
        if not found or len(set(found)) < len(found) or self.item.count(NUMBER) > 1:
            raise ValueError(f"item: must hold {ITEM} or a field such as {{title}}, and each place once")

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the names of the fields in the text of an item, such as `title`."""
        return tuple(place[1:-1] for place in _PLACEHOLDER.findall(self.item) if place not in {ITEM, NUMBER})

    @property
    def user_fields(self) -> tuple[str, ...]:
        """Return the names of the users' fields in the segments, such as `age`, in the order of their places."""
        found = (name for segment in self.segments for name in _IN_SEGMENT.findall(segment))
        return tuple(name for name in found if f"{{{name}}}" != HISTORY)

    def segment_texts(self, history: str, user_fields: Mapping[str, str]) -> list[str]:
        """Return the segments of a user. history: the text of the items. user_fields: values by name."""
        values = {"history": history} | {name: user_fields[name] for name in self.user_fields}
        return [_IN_SEGMENT.sub(lambda place: values[place[1]], segment) for segment in self.segments]

    @property
    def numbered(self) -> bool:
        """Return whether the text of an item holds its place."""
        return NUMBER in self.item

    def item_text(self, number: int, semantic_id: str, fields: Mapping[str, str]) -> str:
        """Return the text of an item. number: its place in the prompt. fields: by name."""
        values = {"item": semantic_id, "number": str(number)} | dict(fields)
        return _FIELD.sub(lambda place: values[place[1]], self.item)


def _in_segments(place: str) -> bool:
    """Return whether segments may hold a place: that of the history, or a field of users."""
    name = _IN_SEGMENT.fullmatch(place)
    return place == HISTORY or (name is not None and f"{{{name[1]}}}" not in _NO_USER_FIELDS)


_ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_NEXT_ITEM = "Can you predict the next possible item that the user may expect?"
_GIVEN_HISTORY = (
    f"Can you predict the next possible item the user may expect, given the following chronological interaction "
    f"history: {HISTORY}"
)

# To add a project, add an entry. The texts are those of the project's own evaluation.
LAYOUTS: dict[str, PromptLayout] = {
    "lc-rec": PromptLayout(
        segments=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\nThe user has interacted with items {HISTORY} in chronological order. {_NEXT_ITEM}"
            "\n\n### Response:",
        ),
        tail=EOS,
        max_items=20,
    ),
    "minionerec": PromptLayout(
        segments=(
            f"{_ALPACA} \n\n### Instruction:\n{_NEXT_ITEM}\n\n",
            f"### User Input: \n{_GIVEN_HISTORY}\n\n### Response:\n",
        ),
        tail=f"\n{EOS}",
        max_items=10,
    ),
    "mimigenrec": PromptLayout(
        segments=(
            f"<|im_start|>system\n{_ALPACA}<|im_end|>\n<|im_start|>user\n{_NEXT_ITEM}\n\n{_GIVEN_HISTORY}<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        tail=EOS,
        max_items=10,
    ),
    "openonerec": PromptLayout(
        segments=(
            "<|im_start|>system\n你是一个智能推荐助手，能够根据用户的浏览历史预测用户可能感兴趣的下一个内容。<|im_end|>\n"
            f"<|im_start|>user\n根据以下用户浏览记录，请预测用户接下来可能观看的内容：\n{HISTORY}/no_think<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n<|sid_begin|>",
        ),
        separator="",
        item=f"<|sid_begin|>{ITEM}<|sid_end|>",
        max_items=512,
        code_names=("<s_a_{}>", "<s_b_{}>", "<s_c_{}>"),
    ),
    # For the encoder of a T5, whose tokenizer ends the text itself.
    "letter-tiger": PromptLayout(segments=(HISTORY,), separator="", tail=EOS, max_items=20),
}


def read_layout(given: str, changes: dict[str, Any] | None = None) -> PromptLayout:
    """Return the layout of a name of `LAYOUTS`, or that of a file.

    A .toml file holds the fields of a layout. Any other file is the prompt's text with `{history}`.

    Args:
        given: the name or the path.
        changes: fields that take the place of the layout's own.

    Raises ImportingError.
    """
    fields = LAYOUTS[given].model_dump() if given in LAYOUTS else _fields_of(Path(given))
    try:
        return PromptLayout(**(fields | (changes or {})))
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise ImportingError(f"{given}: {place}{first['msg'].removeprefix('Value error, ')}") from error


def _fields_of(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # a prompt's line ends are part of it
            text = file.read()
        return tomllib.loads(text) if path.suffix.lower() == ".toml" else {"segments": (text,)}
    except FileNotFoundError:
        raise ImportingError(f"{path}: no such file, and no layout; layouts are {', '.join(LAYOUTS)}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:  # the second: nested too deeply
        raise ImportingError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ImportingError(f"{path}: not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except OSError as error:
        raise ImportingError(f"{path}: {error.strerror}") from error
