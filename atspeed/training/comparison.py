"""Reads a comparison: drafts of several losses, settings, kinds and seeds.

Everything else is alike. A loss may have a grid of settings. All are tried with the first seed, and the best one is trained with
all seeds (atspeed/training/compared_drafts.py).

    base = "beauty-small.toml"                              a recipe with a draft, beside this file
    seeds = [1, 2, 3]
    prompts = 20_000                                        optional, instead of the base's
    schedule = { epochs = 2 }                               optional, over the base's [draft.schedule]; so is `pretraining`

    [[losses]]
    name = "level-kd"
    alignment = { loss = "level-kd", weight = 1.0 }         over the base's [draft.alignment]; "none": cross-entropy alone
    grid = { weight = [0.7, 1.0] }                          optional: all combinations are tried; "none" is no `renormalise`
    draft = { heads = { size = 64 } }                       optional, over the base's [draft]: another shape or kind
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from atspeed.training.errors import RecipeError
from atspeed.training.recipe import Alignment, DraftRecipe, Recipe, problems, read_recipe, read_toml

_OF_THE_TEACHER = {"beams", "prompts"}  # keys of the teacher's data, which all losses share
_OF_THE_DRAFT = {"shape", "heads"}  # keys of `[draft]` in which drafts of one comparison may differ
_AT_ONE_PREFIX, _AT_BEAMS = {"weight", "temperature"}, {"weight", "prefixes"}
_READ_BY = {  # keys of `[draft.alignment]` that a loss reads; a grid of others would train one draft several times
    "none": set[str](),
    "seq-kd": {"weight"},
    "word-kd": _AT_ONE_PREFIX,
    "tvd-kd": _AT_ONE_PREFIX,
    "atspeed-r": _AT_ONE_PREFIX | _AT_BEAMS,
    "atspeed-s": {"density", "renormalise"} | _AT_BEAMS,
    "level-kd": _AT_ONE_PREFIX | _AT_BEAMS,
    "coverage": {"weight", "margin"},
}
_Place = tuple[int | str, ...]
_Value = str | float
Setting = Mapping[str, _Value]
"""Values of keys of `[draft.alignment]`."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Loss(_Part):
    """A loss of the comparison.

    Attributes:
        name: its name in folders and in the output.
        alignment: the keys of `[draft.alignment]` that differ from the base recipe's.
        draft: the keys of `[draft]` that differ.
        grid: the values that are tried of keys of `[draft.alignment]`.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    alignment: dict[str, Any]
    draft: dict[str, Any] = {}
    grid: dict[str, Annotated[list[_Value], Field(min_length=1)]] = {}

    @field_validator("alignment")
    @classmethod
    def _loss_alone(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "loss" not in values:
            raise ValueError('`loss` is missing; "none" is cross-entropy alone')
        if shared := sorted(_OF_THE_TEACHER & values.keys()):
            raise ValueError(f"{shared[0]}: belongs to the teacher's data, which is the same for all losses")
        return values

    @field_validator("draft")
    @classmethod
    def _shape_or_kind(cls, values: dict[str, Any]) -> dict[str, Any]:
        if other := sorted(values.keys() - _OF_THE_DRAFT):
            raise ValueError(f"{other[0]}: is the same for all drafts; {', '.join(sorted(_OF_THE_DRAFT))} may differ")
        return values

    @field_validator("grid")
    @classmethod
    def _distinct_values(cls, grid: dict[str, list[_Value]]) -> dict[str, list[_Value]]:
        if twice := [key for key, values in grid.items() if len(set(values)) < len(values)]:
            raise ValueError(f"{twice[0]}: a value occurs twice")
        return grid

    @model_validator(mode="after")
    def _grid_is_of_the_loss(self) -> _Loss:
        if both := sorted(self.grid.keys() & self.alignment.keys()):
            raise ValueError(f"grid.{both[0]}: is set in `alignment` too")
        read = _READ_BY.get(str(self.alignment["loss"]))
        if read is not None and (idle := sorted(self.grid.keys() - read)):
            may = f"; it reads {', '.join(sorted(read))}" if read else ""
            raise ValueError(f"grid.{idle[0]}: does not change {self.alignment['loss']}{may}")
        return self

    def settings(self) -> Iterator[dict[str, _Value]]:
        """Yield all combinations of the grid; an empty one without a grid."""
        yield from (dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values()))


class _Plan(_Part):
    """The comparison file; the module's docstring describes its keys."""

    base: Path
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    prompts: PositiveInt | None = None
    schedule: dict[str, Any] = {}
    pretraining: dict[str, Any] = {}
    losses: Annotated[list[_Loss], Field(min_length=1)]

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed occurs twice")
        return seeds

    @field_validator("losses")
    @classmethod
    def _distinct_names(cls, losses: list[_Loss]) -> list[_Loss]:
        if len({loss.name for loss in losses}) < len(losses):
            raise ValueError("a name occurs twice")
        return losses


@dataclass(frozen=True)
class Variant:
    """One draft: the base recipe with another alignment, setting, shape, kind and seed.

    Attributes:
        loss: the name of its entry in the file.
        seed: its seed.
        recipe: its recipe.
        own_shape: true if its shape or kind is not the base recipe's.
        setting: its values of the grid, by key.
    """

    loss: str
    seed: int
    recipe: Recipe
    own_shape: bool = False
    setting: Setting = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its folder and of its progress lines."""
        return _name(self.loss, self.setting, self.seed)

    @property
    def pretrained(self) -> str:
        """The name of the folder of its pretrained draft."""
        return self.name if self.own_shape else f"seed{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """A base recipe and the drafts to train.

    Attributes:
        base: the base recipe.
        variants: all losses, settings and seeds, sorted by loss. The first seed chooses among a loss's settings.
    """

    base: Recipe
    variants: Sequence[Variant]

    @property
    def candidates(self) -> list[Variant]:
        """The first seed's drafts of all losses with several settings."""
        seed = self.variants[0].seed
        return [variant for variant in self.variants if variant.seed == seed and len(self._settings(variant.loss)) > 1]

    def of_settings(self, best: Mapping[str, Setting]) -> list[Variant]:
        """Return the drafts of all seeds; of a loss in `best`, those of that setting alone."""
        return [variant for variant in self.variants if best.get(variant.loss, variant.setting) == variant.setting]

    def _settings(self, loss: str) -> list[Setting]:
        seed = self.variants[0].seed
        return [variant.setting for variant in self.variants if (variant.loss, variant.seed) == (loss, seed)]

    @property
    def first_at_target(self) -> Variant | None:
        """The first draft that learns at the target's beams, whose teacher data all such drafts share."""
        at_target = (
            each for each in self.variants if each.recipe.draft and _alignment(each.recipe.draft).prefixes == "target"
        )
        return next(at_target, None)

    @property
    def same_teacher(self) -> bool:
        """True if the base recipe's own draft can use the same teacher data."""
        return _teacher_settings(self.base) in {None, _teacher_settings(self.variants[0].recipe)}


def _alignment(draft: DraftRecipe) -> Alignment:
    return draft.alignment or Alignment()


def _name(loss: str, setting: Setting, seed: int) -> str:
    values = (f"{key}-{value}" for key, value in setting.items())
    return "-".join([loss, *values, f"seed{seed}"])


def _teacher_settings(recipe: Recipe) -> tuple[int, int] | None:
    """Return the beams and prompts of a recipe's teacher data, or None without alignment."""
    alignment = recipe.draft.alignment if recipe.draft else None
    return None if alignment is None else (alignment.beams, alignment.prompts)


def read_comparison(path: Path) -> Comparison:
    """Parse and validate a comparison and its base. Raises RecipeError naming the file and the key at fault."""
    plan = read_toml(_Plan, path)
    base = read_recipe(path.parent / plan.base)
    if base.draft is None:
        raise RecipeError(f"{path}: base: {plan.base} has no draft")
    variants = tuple(_variants(path, plan, base, base.draft))
    folders = [variant.name for variant in variants]
    if twice := [name for name in folders if folders.count(name) > 1]:
        raise RecipeError(f"{path}: losses: two drafts would have the folder {twice[0]}")
    return Comparison(base, variants)


def _variants(path: Path, plan: _Plan, base: Recipe, draft: DraftRecipe) -> Iterator[Variant]:
    if plan.pretraining and draft.pretraining is None:
        raise RecipeError(f"{path}: pretraining: the draft of {plan.base} has none")
    found = ((index, loss, setting) for index, loss in enumerate(plan.losses) for setting in loss.settings())
    for (index, loss, setting), seed in product(found, plan.seeds):
        try:
            changed = DraftRecipe.model_validate(_draft(plan, loss, setting, seed, draft))
        except ValidationError as error:
            raise RecipeError(f"{path}: {problems(error, partial(_in_file, index, loss))}") from error
        name = f"{base.name}-{_name(loss.name, setting, seed)}"
        recipe = base.model_copy(update={"name": name, "draft": changed})
        yield Variant(loss.name, seed, recipe, bool(loss.draft), setting)


def _in_file(index: int, loss: _Loss, place: _Place) -> _Place:
    """Map a key of a draft to its place in the file: the entry of a loss if that sets it, else the top."""
    if place[:1] == ("alignment",):
        in_grid = len(place) > 1 and place[1] in loss.grid
        return ("losses", index, "grid", *place[1:]) if in_grid else ("losses", index, *place)
    return ("losses", index, "draft", *place) if place and place[0] in loss.draft else place


def _draft(plan: _Plan, loss: _Loss, setting: Setting, seed: int, base: DraftRecipe) -> dict[str, Any]:
    """Build the values of a variant's draft, not validated."""
    values = base.model_dump() | {"seed": seed}
    for name, changes in (("schedule", plan.schedule), ("pretraining", plan.pretraining)):
        if changes:
            values[name] = values[name] | changes
    alignment = {**_alignment(base).model_dump(), **loss.alignment, **setting}
    for key in ("loss", "renormalise"):
        if alignment[key] == "none":  # TOML has no null
            alignment[key] = None
    if plan.prompts is not None:
        alignment["prompts"] = plan.prompts
    return values | loss.draft | {"alignment": alignment}
