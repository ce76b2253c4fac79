"""Renders prompts as a checkpoint's authors do: a text, through their tokenizer.

It knows nothing of a bundle's PromptTemplate, so it can be compared with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.user_fields import UserFields
from atspeed.importing.layouts import EOS, PromptLayout

_TEXTS_AT_ONCE = 1024  # a tokenizer spreads a batch over its threads


@dataclass(frozen=True)
class UserPrompt:
    """The prompt of a layout through a tokenizer.

    Attributes:
        layout: the texts.
        tokenizer: a Hugging Face tokenizer.
        semantic_id: the text of an item's code tokens, by item id.
        fields: the fields of an item that the layout names, by item id.
        user_fields: the values of the user's fields, where a call gives no others.
    """

    layout: PromptLayout
    tokenizer: Any
    semantic_id: Callable[[str], str]
    fields: Callable[[str], Mapping[str, str]] = lambda _: {}
    user_fields: UserFields = field(default_factory=dict)

    def tokens(self, history: Sequence[str], user_fields: UserFields | None = None) -> list[int]:
        """Return the token ids of a history of item ids, oldest first."""
        return next(self.batches([history], [user_fields] if user_fields else None))[0]

    def batches(
        self, histories: Sequence[Sequence[str]], user_fields: Sequence[UserFields] | None = None
    ) -> Iterator[list[list[int]]]:
        """Yield the token ids of histories, in their order, some at a time. user_fields: those of each history's user."""
        for start in range(0, len(histories), _TEXTS_AT_ONCE):
            part = histories[start : start + _TEXTS_AT_ONCE]
            users = user_fields[start : start + _TEXTS_AT_ONCE] if user_fields else [self.user_fields] * len(part)
            yield self._encoded([self.texts(history, user) for history, user in zip(part, users, strict=True)])

    def texts(self, history: Sequence[str], user_fields: UserFields) -> list[str]:
        """Return the segments with the newest items of a history."""
        window = history[-self.layout.max_items :]
        items = (
            self.layout.item_text(number, self.semantic_id(item), self.fields(item))
            for number, item in enumerate(window, start=1)
        )
        spelled = self.layout.separator.join(items)
        return self.layout.segment_texts(spelled, user_fields)

    def tail(self, semantic_id: str) -> list[int]:
        """Return the token ids of an item's codes and of the text that is scored behind them."""
        text = semantic_id + self.layout.tail.removesuffix(EOS)
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens + ([self.tokenizer.eos_token_id] if self.layout.tail.endswith(EOS) else [])

    def _encoded(self, texts: Sequence[Sequence[str]]) -> list[list[int]]:
        """Encode prompts. One text keeps what the tokenizer adds; of several, only a BOS stands before the first.

        The second is what MiniOneRec does.
        """
        if len(texts[0]) == 1:
            whole: list[list[int]] = self.tokenizer([text for (text,) in texts])["input_ids"]
            return whole
        parts = [
            self.tokenizer(list(column), add_special_tokens=False)["input_ids"] for column in zip(*texts, strict=True)
        ]
        first = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return [[*first, *(token for part in row for token in part)] for row in zip(*parts, strict=True)]


def user_prompt(
    layout: PromptLayout,
    tokenizer: Any,
    catalogue: Catalogue,
    code_tokens: Sequence[int],
    fields: Callable[[str], Mapping[str, str]] = lambda _: {},
) -> UserPrompt:
    """Return the user's prompt for the items of a bundle. The tokenizer names the code tokens.

    code_tokens: the token of each code column. fields: of an item, see `UserPrompt`.
    """

    def semantic_id(item: str) -> str:
        (tokens,) = catalogue.spelled_tokens(catalogue.find([item]), code_tokens)
        return "".join(tokenizer.convert_ids_to_tokens(tokens.tolist()))

    return UserPrompt(layout, tokenizer, semantic_id, fields)
