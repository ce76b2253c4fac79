"""The prompt template: from a history to token ids, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator


class PromptTemplate(BaseModel):
    """The form of a prompt: prefix + item (+ separator + item)* + suffix.

    An item is the tokens of its codes, without its tail. Training fixes the segments. A prompt holds the newest items of a
    history. Beyond `max_items` items the oldest are dropped, `drop_block` at a time. So the beginning of the prompt, and its
    cached KV, stays the same for `drop_block` new items. `drop_block = 1` is the sliding window of the AtSpeed paper.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """Tokens before the history; at least a BOS."""
    separator: tuple[NonNegativeInt, ...] = ()
    """Tokens between two items."""
    suffix: tuple[NonNegativeInt, ...] = ()
    """Tokens after the history."""
    max_items: PositiveInt = 20
    drop_block: PositiveInt = 1

    @model_validator(mode="after")
    def _block_within_window(self) -> PromptTemplate:
        if self.drop_block > self.max_items:
            raise ValueError(f"drop_block: {self.drop_block} is larger than max_items, {self.max_items}")
        return self

    def window_start(self, items: int) -> int:
        """Return the index of the first item in the prompt, for a history of `items` items."""
        excess = max(0, items - self.max_items)
        return -(-excess // self.drop_block) * self.drop_block

    def tokens(self, items: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        """Return the prompt of a window of items, int64 [prompt length]. Each item is given as its code tokens."""
        parts: list[npt.NDArray[np.int64] | tuple[int, ...]] = [self.prefix]
        for index, item in enumerate(items):
            if index:
                parts.append(self.separator)
            parts.append(item)
        parts.append(self.suffix)
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])

    def item_stride(self, codes: int) -> int:
        """Return the tokens from the beginning of an item of so many codes to that of the next."""
        return codes + len(self.separator)

    def max_tokens(self, codes: int) -> int:
        """Return the length of the longest prompt. codes: those of the longest item."""
        return len(self.prefix) + len(self.suffix) + self.max_items * codes + (self.max_items - 1) * len(self.separator)
