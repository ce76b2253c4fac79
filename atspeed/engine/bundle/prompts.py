"""Prompts of a bundle's model, from histories of the catalogue's items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.item_texts import ItemTexts
from atspeed.engine.bundle.manifest import ROLES, ModelEntry, Role
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.bundle.user_fields import UserFields, check_user_fields


@dataclass(frozen=True)
class Prompts:
    """The prompts of one model.

    Attributes:
        template: their form.
        catalogue: the items.
        code_tokens: int64 [C]; the token of each code column.
        texts: the texts of the items, if the template has any.
    """

    template: PromptTemplate
    catalogue: Catalogue
    code_tokens: Int64
    texts: ItemTexts | None = None

    def __post_init__(self) -> None:
        if (self.texts is None) != (self.template.texts is None):
            raise ValueError("texts: the template and the prompts must agree on whether items have texts")

    @classmethod
    def of(cls, entry: ModelEntry, catalogue: Catalogue, texts: ItemTexts | None = None) -> Prompts:
        """Return the prompts of a model's entry."""
        return cls(entry.prompt, catalogue, np.asarray(entry.code_tokens, dtype=np.int64), texts)

    def window(self, history: Int64) -> Int64:
        """Return the items of a history that its prompt holds: the newest ones, oldest first. history: item indices [h]."""
        return history[self.template.window_start(len(history)) :]

    def tokens(self, history: Int64, user_fields: UserFields | None = None) -> Int64:
        """Return the prompt of a history, int64 [prompt].

        history: item indices [h], oldest first. user_fields: values of a user, also of fields that this model's prompts do not
        hold. Raises UserFieldError when one that they hold is missing, or has another value.
        """
        held = {field.name for field in self.template.user_fields}
        values = {name: value for name, value in (user_fields or {}).items() if name in held}
        check_user_fields(self.template.user_fields, values)
        window = self.window(history)
        if self.texts is not None:
            return self.template.tokens(self.texts.of(window), values)
        return self.template.tokens(self.catalogue.spelled_tokens(window, self.code_tokens), values)


def read_items(bundle: Bundle) -> tuple[Catalogue, dict[Role, Prompts]]:
    """Return the catalogue, ready for its first request, and the prompts of both models."""
    catalogue = bundle.catalogue()
    catalogue.warm_up()
    return catalogue, {role: prompts_of(bundle, role, catalogue) for role in ROLES if role in bundle.manifest.models}


def prompts_of(bundle: Bundle, role: Role, catalogue: Catalogue) -> Prompts:
    """Return the prompts of a bundle's model for its catalogue. Raises BundleError when its texts cannot be read."""
    return Prompts.of(bundle.model(role), catalogue, texts_of(bundle, role))


def texts_of(bundle: Bundle, role: Role) -> ItemTexts | None:
    """Read the texts of the items in a model's prompts; None if they have none. Raises BundleError."""
    entry = bundle.model(role)
    if entry.prompt.texts is None:
        return None
    return ItemTexts.load(bundle.root / texts_folder(role), entry.prompt.texts, vocab_size=entry.vocab_size)


def texts_folder(role: Role) -> str:
    """Return the folder of a model's texts inside a bundle."""
    return f"prompts/{role}"
