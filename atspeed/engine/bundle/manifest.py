"""The bundle: the directory that training writes and serving reads.

    bundle/
        manifest.json           this module's `Manifest`
        model.sig               `atspeed.artefacts.signature`, if the bundle is signed
        catalogue/*.npy         `atspeed.engine.bundle.catalogue.Catalogue`
        target/model.onnx(.data)      device.onnx for devices; encoder.onnx(.data), if the model has an encoder
        prompts/target/*.npy          `atspeed.engine.bundle.item_texts.ItemTexts`, if items have texts
        draft/model.onnx(.data)
        quantiser/codebooks.npy       `atspeed.engine.bundle.quantiser.Quantiser`, if training made the code paths

The manifest holds the SHA-256 of every file. The bundle's version is a hash of these, so two bundles with the same version serve
the same lists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from atspeed.engine.bundle.bundle_files import check_is_file, files_below, link_or_copy, sha256_of
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.bundle.quantiser import QuantiserEntry
from atspeed.engine.bundle.user_fields import draft_problem
from atspeed.engine.errors import BundleError
from atspeed.engine.files.atomic_write import replacing
from atspeed.engine.search.scoring import ScoringRule

MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]*$"
Precision = Literal["float32", "float16", "bfloat16", "int8"]
Head = Literal["vocab", "codes"]
"""The tokens whose logits a device graph computes. Rule `vocab` needs the first; the other rules are the same under both."""
Role = Literal["target", "draft"]
ROLES: tuple[Role, ...] = ("target", "draft")
LANGUAGE_MODEL = "language-model"
"""The draft kind of a language model that is served by its own decoder."""
LEVEL_HEADS = "level-heads"
"""The draft kind of a decoder that reads the prompt, with a head for each level but the first."""
PlanScale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or str(path) != name
        or name in {".", MANIFEST, SIGNATURE}
        or "\0" in name
    ):
        raise ValueError("not the path of a file inside the bundle")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""In hex. A cache names files by it, so it must be no path."""
ModelPath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+/[A-Za-z0-9_.-]+$")]


class _Part(BaseModel):
    """A part of the manifest: frozen, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderEntry(_Part):
    """The encoder of an encoder-decoder model, beside its decoder."""

    path: ModelPath
    """The .onnx file: FOLDER/FILE inside the bundle, in the decoder's folder."""
    decoder_start: NonNegativeInt
    """The token id that the decoder begins with. It evaluates the root."""


class DeviceGraphEntry(_Part):
    """The graph that devices load, beside the host's; it has the same weights."""

    path: ModelPath
    """The .onnx file: FOLDER/FILE inside the bundle, in the folder of the host's graph."""
    head: Head


class ModelEntry(_Part):
    """One exported decoder: its files, its shape, and its tokens for prompts and codes.

    Draft and target share the catalogue. Their vocabularies and prompts may differ.
    """

    path: ModelPath
    """The .onnx file: FOLDER/FILE inside the bundle."""
    architecture: str
    """Hugging Face model type of the checkpoint, such as llama or t5."""
    precision: Precision
    parameters: PositiveInt
    vocab_size: PositiveInt
    layers: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    max_positions: PositiveInt
    """The longest sequence, prompt and codes together."""
    code_tokens: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """The token id of each code column, level by level, [C]. Levels may share tokens."""
    prompt: PromptTemplate
    fingerprint: str
    """The hash of the model's files: part of the keys of its prefix cache."""
    # The fields below are not written when they have their default: a bundle without them keeps its version.
    plan_scale: tuple[PlanScale, ...] | None = Field(default=None, exclude_if=lambda scale: scale is None)
    """The draft's plan scale: the unit of a plan's margins, per level 1..L-1."""
    draft_kind: str = Field(default=LANGUAGE_MODEL, exclude_if=lambda kind: kind == LANGUAGE_MODEL)
    """How the draft proposes nodes: a kind of draft_service/draft_kinds.py."""
    heads: tuple[ModelPath, ...] = Field(default=(), exclude_if=lambda heads: not heads)
    """The .onnx files of the heads of levels 2..L, in the decoder's folder; draft kind `level-heads` only."""
    inflated_from: PositiveInt | None = Field(default=None, exclude_if=lambda parameters: parameters is None)
    """The parameters of the trained model, if this one is its inflation (atspeed/training/inflation.py)."""
    encoder: EncoderEntry | None = Field(default=None, exclude_if=lambda encoder: encoder is None)
    """The encoder, if prompts are read by one."""
    device_graph: DeviceGraphEntry | None = Field(default=None, exclude_if=lambda graph: graph is None)
    """The graph for devices, if the model has one."""
    ordered_sums: bool = Field(default=False, exclude_if=lambda ordered: not ordered)
    """True if every float sum of the graph has one order (atspeed/training/ordered_attention.py)."""

    @property
    def kv_dtype(self) -> Literal["float32", "float16"]:
        """Return the number format of keys and values on the host; a device keeps them in the model's precision."""
        return "float16" if self.precision == "float16" else "float32"

    @property
    def device_kv_dtype(self) -> Literal["float32", "float16", "bfloat16"]:
        """Return the number format of keys and values in the device graph, which computes in the stored precision."""
        return "float32" if self.precision == "int8" else self.precision

    @property
    def plan_invariant(self) -> bool:
        """Return whether no bit of a score depends on the other tokens of a pass, on a CPU.

        Without ordered sums they change a float32 score by up to 2e-5, and a float16 score by 1e-2.
        """
        return self.ordered_sums or self.precision == "int8"

    @model_validator(mode="after")
    def _tokens_are_the_models(self) -> ModelEntry:
        prompt, encoder = self.prompt, self.encoder
        if not (prompt.prefix or (encoder and prompt.suffix)):
            needed = "suffix: must hold a token if the prefix holds none" if encoder else "prefix: must hold a token"
            raise ValueError(f"prompt.{needed}")
        parts = {
            "encoder.path": encoder and encoder.path,
            "device_graph.path": self.device_graph and self.device_graph.path,
        }
        for field, path in (*parts.items(), *(("heads", path) for path in self.heads)):
            if path and folder_of(path) != folder_of(self.path):
                raise ValueError(f"{field}: not in the folder of {self.path}")
        if (self.draft_kind == LEVEL_HEADS) != bool(self.heads):
            raise ValueError(f"heads: {len(self.heads)} files, but draft_kind is {self.draft_kind}")
        if self.heads and encoder:
            raise ValueError("heads: they read the state of a decoder, and this model has an encoder")
        started = (encoder.decoder_start,) if encoder else ()
        named = (("code_tokens", self.code_tokens), ("prompt", prompt.fixed_tokens), ("encoder.decoder_start", started))
        for name, tokens in named:
            if max(tokens, default=0) >= self.vocab_size:
                raise ValueError(f"{name}: a token id is outside the vocabulary of {self.vocab_size}")
        return self


class Provenance(_Part):
    """The origin of a bundle, for people."""

    recipe: str = ""
    data: str = ""
    terms: str = ""
    """The terms of the training data."""
    created_at: datetime = Field(default_factory=lambda: datetime.now(tz=UTC))
    versions: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)
    draft: str = Field(default="", exclude_if=lambda draft: not draft)
    """The recipe and the histories of a draft that was trained for a given target."""
    imported: dict[str, str] = Field(default_factory=dict, exclude_if=lambda facts: not facts)
    """The checkpoint, index and prompt of an imported target."""


class Manifest(_Part):
    """The content of manifest.json."""

    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    scoring_rule: ScoringRule
    allow_empty_history: bool = False
    items_per_path: PositiveInt | None = Field(default=None, exclude_if=lambda items: items is None)
    """The most items of one code path in a list, for requests that do not set their own; None: no limit."""
    catalogue_version: str
    target: ModelEntry
    draft: ModelEntry | None
    quantiser: QuantiserEntry | None = Field(default=None, exclude_if=lambda entry: entry is None)
    """The quantiser that gave the items their code paths; None if they came with the data or the checkpoint."""
    provenance: Provenance = Provenance()
    files: dict[FileName, Sha256]
    """The SHA-256 of every file, by path relative to the bundle."""

    @model_validator(mode="after")
    def _only_a_draft_plans(self) -> Manifest:
        if self.target.plan_scale is not None:
            raise ValueError("target.plan_scale: only a draft has one")
        if self.target.draft_kind != LANGUAGE_MODEL:
            raise ValueError("target.draft_kind: only a draft has one")
        return self

    @model_validator(mode="after")
    def _the_draft_reads_every_user(self) -> Manifest:
        fields = self.draft.prompt.user_fields if self.draft else ()
        if problem := draft_problem(fields, self.target.prompt.user_fields):
            raise ValueError(f"draft.prompt.user_fields: {problem}")
        return self

    @property
    def version(self) -> str:
        """Return the hash of all that the bundle serves, without name and provenance. Takes about a millisecond each time."""
        served = self.model_dump(mode="json", exclude={"provenance", "name"})
        return hashlib.sha256(json.dumps(served, sort_keys=True).encode()).hexdigest()[:16]

    def model_version(self, role: Role) -> str:
        """Return the hash of all that a role's scores and node ids depend on; empty if the bundle has no such model."""
        if role not in self.models:
            return ""
        served = {"rule": self.scoring_rule, "catalogue": self.catalogue_version}
        # The plan scale decides the nodes of a plan and changes no score.
        served["model"] = self.models[role].model_dump_json(exclude={"plan_scale"})
        return hashlib.sha256(json.dumps(served, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def models(self) -> dict[str, ModelEntry]:
        """Return the models by role: `target`, and `draft` if there is one."""
        return {"target": self.target} | ({"draft": self.draft} if self.draft else {})


def read_manifest(root: Path) -> Manifest:
    """Parse and validate a bundle's manifest. Raises BundleError naming the field at fault."""
    path = root / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    return parse_manifest(str(path), content)


def parse_manifest(place: str, content: bytes) -> Manifest:
    """Parse and validate the content of a manifest. Raises BundleError naming its place and the field at fault."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write manifest.json in one step. Writers call this last, so that a half-written bundle is never readable.

    Raises BundleError, naming the field, when `read_manifest` would refuse the manifest; the file stays as it was then.
    """
    content = f"{manifest.model_dump_json(indent=1)}\n".encode()
    parse_manifest(str(root / MANIFEST), content)
    with replacing(root / MANIFEST) as file:
        file.write(content)


def link_files(root: Path, names: Iterable[str], out: Path) -> None:
    """Link or copy files of a bundle into another one. Raises BundleError naming the first missing file."""
    for name in names:
        check_is_file(root, name)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(root / name, out / name)


def hash_files(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a bundle but its manifest and signature, by relative path."""
    return {name: sha256_of(root, name) for name in files_below(root) if name not in {MANIFEST, SIGNATURE}}


def fingerprint(files: dict[str, str], folder: str) -> str:
    """Return one hash of the files below `folder`, from `hash_files`: a model's fingerprint."""
    inside = sorted((name, digest) for name, digest in files.items() if is_in(name, folder))
    return hashlib.sha256(json.dumps(inside).encode()).hexdigest()[:16]


def folder_of(path: str) -> str:
    """Return the first folder of a path in a bundle: that of a model, for its files."""
    return path.partition("/")[0]


def is_in(name: str, folder: str | None) -> bool:
    """Return whether a file of a bundle is below a folder; False without a folder."""
    return folder is not None and name.startswith(f"{folder}/")
