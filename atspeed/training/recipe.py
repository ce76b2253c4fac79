"""The recipe of a training run, read from TOML.

Unknown keys are refused, and bad values name their key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from atspeed.engine.bundle.manifest import Precision, Role
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.errors import RecipeError

Share = Annotated[float, Field(ge=0, le=1)]
# The largest seed that torch, numpy and scikit-learn all take.
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
_CODEBOOK_MAXIMUM = 65536  # codes of 16 bits
_Read = TypeVar("_Read", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _GrownPart(_Part):
    """A part with options that were added after runs had used it.

    An option at its default is not written, so that older recipes, and with them the keys of their stages, stay the same.
    """

    _later: ClassVar[frozenset[str]]

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = serialise(self)
        for name in self._later:
            if getattr(self, name) == type(self).model_fields[name].default:
                written.pop(name, None)
        return written


class MovielensData(_Part):
    """MovieLens-100K. The run's `data` is the recbole wheel or a folder to keep it in, and is optional."""

    source: Literal["movielens-100k"]


class AtspeedData(_Part):
    """A folder with items.jsonl and train/valid/test.txt, given to the run as `data`."""

    source: Literal["atspeed"]


class SyntheticData(_Part):
    """Data generated from a seed; see atspeed/training/synthetic.py."""

    source: Literal["synthetic"]
    items: Annotated[int, Field(ge=10)] = 120
    users: Annotated[int, Field(ge=10)] = 300
    levels: PositiveInt = 3
    codebook_size: PositiveInt = 8
    seed: Seed = 1


class GivenCodes(_Part):
    """Code paths that the data contains: in its items, or in an LC-Rec index file in the data folder."""

    kind: Literal["given"]
    codebook_size: Annotated[int, Field(ge=1, le=_CODEBOOK_MAXIMUM)] = 256
    index_file: str | None = None


class QuantisedCodes(_Part):
    """Code paths by residual quantisation of item embeddings: text blended with co-occurrence in train histories."""

    kind: Literal["quantised"]
    levels: Annotated[int, Field(ge=1, le=8)] = 3
    codebook_bits: int = Field(default=6, ge=1, le=12)
    """Binary logarithm of the number of codes per level."""
    text_weight: Share = 0.5
    """Share of the text embedding: 1 is text alone, 0 is co-occurrence alone."""
    neighbours: PositiveInt = 10
    """Largest distance in a history at which two items count as co-occurring."""
    factors: PositiveInt = 64
    """Dimensions of the co-occurrence embedding."""


class PromptWindow(_Part):
    """The length of history in a prompt; see atspeed.engine.bundle.prompt.PromptTemplate."""

    max_items: PositiveInt = 20
    drop_block: PositiveInt = 1

    @model_validator(mode="after")
    def _block_within_window(self) -> PromptWindow:
        if self.drop_block > self.max_items:
            raise ValueError(f"drop_block: {self.drop_block} is larger than max_items, {self.max_items}")
        return self


class Shape(_GrownPart):
    """A small Llama over the code vocabulary, from scratch."""

    _later: ClassVar = frozenset({"dropout"})

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    tie_embeddings: bool = True
    attention_dropout: Share = 0.0
    dropout: Share = 0.0
    """Share of embeddings and of each block's output that is dropped in training."""

    @model_validator(mode="after")
    def _divisible(self) -> Shape:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size: {self.hidden_size} is not a multiple of heads, {self.heads}")
        if (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"hidden_size: {self.hidden_size} / {self.heads} heads is odd, rotary embeddings need pairs"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads: {self.heads} is not a multiple of kv_heads, {self.kv_heads}")
        return self


class PretrainedBase(_Part):
    """A pretrained Hugging Face model to fine-tune: a local folder with its tokenizer, and the words around the history."""

    folder: Path
    prefix: str = "The user has interacted with the following items in order: "
    separator: str = ", "
    suffix: str = ". The next item is: "


class Schedule(_GrownPart):
    """AdamW with a linear warm-up and a cosine decay to a twentieth, over `epochs`; the best epoch is kept."""

    _later: ClassVar = frozenset({"gradient_accumulation", "mixed_precision"})

    epochs: PositiveInt
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-3
    warmup: Share = 0.05
    """Share of the run with a rising learning rate."""
    weight_decay: NonNegativeFloat = 0.05
    gradient_clip: PositiveFloat = 1.0
    patience: PositiveInt = 5
    """Number of epochs without a better one after which training stops."""
    item_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that an item is left out of a training history."""
    select_by: Literal["recall", "loss"] = "recall"
    """Validation measure that chooses the best epoch."""
    validation_users: PositiveInt = 1000
    gradient_accumulation: PositiveInt = 1
    """Batches per step and process."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Number format of training passes; weights stay float32. fp16 needs a GPU."""


class ModelRecipe(_Part):
    """Target or draft: a `shape` from scratch or a `base` to fine-tune, its schedule, and its export's precision."""

    shape: Shape | None = None
    base: PretrainedBase | None = None
    schedule: Schedule
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _one_origin(self) -> ModelRecipe:
        if (self.shape is None) == (self.base is None):
            raise ValueError("give either `shape` or `base`")
        return self


AlignmentLoss = Literal["atspeed-s", "atspeed-r", "word-kd", "tvd-kd", "seq-kd", "level-kd", "coverage"]
_AT_BEAMS = ("atspeed-s", "atspeed-r", "level-kd")  # losses that compare both models at prefixes of beams


class Alignment(_GrownPart):
    """The alignment of the draft: (1 - weight) * cross-entropy of the gold item + weight * loss.

    atspeed/training/losses.py defines the losses. Each prompt is the one that the target answered, so the schedule's
    item_dropout does not apply. The best epoch is the one whose `budget` nodes per level hold the target's beams most often, so
    select_by does not apply either.
    """

    _later: ClassVar = frozenset({"prefixes"})

    loss: AlignmentLoss | None = None
    """None for cross-entropy alone, on the same prompts."""
    weight: Share = 0.7
    beams: PositiveInt = 20
    """The target's beams per prompt; also K of atspeed-s."""
    density: NonNegativeFloat = 1.0
    """Weight of the density term of atspeed-s."""
    renormalise: PositiveFloat | None = None
    """Temperature over the top K of atspeed-s."""
    temperature: PositiveFloat = 1.0
    """Temperature of both models in atspeed-r, word-kd, tvd-kd and level-kd."""
    budget: PositiveInt = 40
    """The draft's nodes per level, N; at least `beams`."""
    margin: NonNegativeFloat = 1.0
    """Distance by which `coverage` wants a beam above the other nodes, nats."""
    prompts: PositiveInt = 100_000
    """Maximum number of training prompts, drawn by the seed."""
    prefixes: Literal["target", "draft"] = "target"
    """Whose beams give the prefixes of atspeed-s, atspeed-r and level-kd: the target's, or those of the pretrained draft."""

    @model_validator(mode="after")
    def _loss_is_at_beams(self) -> Alignment:
        if self.prefixes == "draft" and self.loss not in _AT_BEAMS:
            raise ValueError(
                f"prefixes: the draft's beams serve {', '.join(_AT_BEAMS)}, not {self.loss or 'cross-entropy'}"
            )
        return self

    @model_validator(mode="after")
    def _budget_holds_the_beams(self) -> Alignment:
        if self.budget < self.beams:
            raise ValueError(f"budget: {self.budget} nodes cannot hold {self.beams} beams")
        return self


class Heads(_Part):
    """A head per level on the draft's state after the prompt: one pass drafts all levels (atspeed/training/level_heads.py)."""

    size: PositiveInt
    """Inner size of a head."""


class DraftRecipe(ModelRecipe):
    """The draft. Without `alignment` it is trained like the target.

    Attributes:
        heads: the heads of a draft of one pass; None for a language model.
        alignment: the alignment with the target.
        pretraining: a schedule of training like the target's, before the alignment.
        seed: the seed of its weights and batches, the recipe's by default. Another seed gives another draft of the same target.
    """

    heads: Heads | None = None
    alignment: Alignment | None = None
    pretraining: Schedule | None = None
    seed: Seed | None = None

    @model_validator(mode="after")
    def _pretraining_needs_alignment(self) -> DraftRecipe:
        if self.pretraining is not None and self.alignment is None:
            raise ValueError("pretraining: needs an `alignment` after it")
        return self

    @model_validator(mode="after")
    def _own_beams_need_pretraining(self) -> DraftRecipe:
        if self.alignment is not None and self.alignment.prefixes == "draft" and self.pretraining is None:
            raise ValueError("alignment.prefixes: the draft's own beams need a `pretraining` before them")
        return self

    @model_validator(mode="after")
    def _heads_are_trained_from_scratch(self) -> DraftRecipe:
        if self.heads is not None and self.shape is None:
            raise ValueError("heads: need a `shape`; a `base` is served as a language model")
        if self.heads is not None and self.precision != "float32":
            raise ValueError(f"precision: a draft with heads is exported in float32, not in {self.precision}")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_parts(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out absent parts, so that older recipes keep the keys of their stages."""
        written: dict[str, Any] = serialise(self)
        for name in ("heads", "alignment", "pretraining", "seed"):
            if getattr(self, name) is None:
                written.pop(name, None)
        return written


class RunSettings(_Part):
    """The settings that both models of a run share."""

    seed: Seed = 1
    scoring_rule: ScoringRule = ScoringRule.VOCAB
    allow_empty_history: bool = False
    prompt: PromptWindow = PromptWindow()


class Recipe(RunSettings):
    """A training run: data -> semantic IDs -> target -> draft -> bundle."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    data: Annotated[MovielensData | AtspeedData | SyntheticData, Field(discriminator="source")]
    codes: Annotated[GivenCodes | QuantisedCodes, Field(discriminator="kind")]
    target: ModelRecipe
    draft: DraftRecipe | None = None
    evaluation_users: PositiveInt = 5000
    """Maximum number of users in the final evaluation."""

    @property
    def parts(self) -> dict[Role, ModelRecipe]:
        """The models by role: `target` and, if there is one, `draft`."""
        parts: dict[Role, ModelRecipe] = {"target": self.target}
        if self.draft is not None:
            parts["draft"] = self.draft
        return parts


class DistillRecipe(_Part):
    """A draft for the target of a bundle, which also gives the scoring rule and the catalogue."""

    seed: Seed = 1
    prompt: PromptWindow | None = None
    """The draft's window of history; by default the target's."""
    draft: DraftRecipe = DraftRecipe(
        # About two million parameters beside the code tokens: small enough for a CPU, and for a target of 20M and more.
        shape=Shape(hidden_size=192, intermediate_size=512, layers=4, heads=3, kv_heads=3),
        # The schedules of runs/beauty-small.toml, whose losses were compared in docs/benchmarks.
        pretraining=Schedule(
            epochs=6, batch_size=32, learning_rate=2e-3, item_dropout=0.1, select_by="loss", validation_users=500
        ),
        schedule=Schedule(epochs=5, batch_size=32, learning_rate=1.5e-3, weight_decay=0.01, validation_users=300),
        alignment=Alignment(loss="level-kd", weight=1.0, beams=20, budget=80),
    )

    @model_validator(mode="after")
    def _learns_from_the_target(self) -> DistillRecipe:
        if self.draft.alignment is None:
            raise ValueError("draft.alignment: is missing, so the draft would not learn from the target")
        return self


def read_recipe(path: Path) -> Recipe:
    """Parse and validate a recipe. Raises RecipeError naming the file and the key at fault."""
    return read_toml(Recipe, path)


def read_distill_recipe(path: Path | None) -> DistillRecipe:
    """Parse and validate a draft's recipe; None is the default one. Raises RecipeError naming the file and the key at fault."""
    return DistillRecipe() if path is None else read_toml(DistillRecipe, path)


def read_toml(kind: type[_Read], path: Path) -> _Read:
    """Parse and validate a file. Raises RecipeError naming it and the key at fault."""
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except ValidationError as error:  # a ValueError too
        raise RecipeError(f"{path}: {problems(error)}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: {error}") from error


def problems(error: ValidationError, renamed: Callable[[tuple[int | str, ...]], tuple[int | str, ...]] = tuple) -> str:
    """List the errors by key. renamed: maps the place of a value in the model to its place in the file."""
    return "; ".join(f"{'.'.join(map(str, renamed(p['loc'])))}: {p['msg']}" for p in error.errors())
