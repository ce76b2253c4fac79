"""Lists on a GPU at the size of large models, in an hour.

`atspeed.benchmarks.gpu` is the shorter one, for minutes. deploy/gpu-setup.sh prepares such a machine.

1. Exactness: the trained bundle's lists on the device, target-only and strict, are those of the CPU, in float32.
2. Time of a list at the size of large models: the bundle inflated to each shape, strict and target-only, cold and warm, and
   Hugging Face `generate` on the same weights and device for some users.
3. Single passes: their time by tokens, and over the time to read the weights once; and a search of 256 beams for 3 codes
   behind a prompt of 1,000 tokens.

Everything runs on the CPU too, as in the tests.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from atspeed.benchmarks import decode
from atspeed.benchmarks.decode import DecodeConfig, Peer
from atspeed.benchmarks.decode_peers import HuggingFace
from atspeed.benchmarks.decode_rows import DecodeRow
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.model_probe import BeamsRow, PassRow, bytes_per_second, bytes_read, probe_beams, probe_passes
from atspeed.benchmarks.near_ties import compare
from atspeed.benchmarks.results import BenchmarkError, comparison_counts, to_json
from atspeed.benchmarks.services import ServiceOptions, ask, progress_bar, services
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import Precision, Role
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.loading import load_decoder
from atspeed.engine.model.provider import Provider
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Mode
from atspeed.training.inflated_bundles import Inflation, inflate_bundle
from atspeed.training.inflation import SHAPES
from atspeed.training.pretrained import load_checkpoint
from atspeed_client import RecommendRequest

NAME = "gpu-lists"
SIZES = ("1.7b+68m", "7b+68m")
NEW_TOKENS = (1, 8, 20, 60, 120, 240, 480)
CACHED_TOKENS = (128, 1000)
_EXACT_WIDTHS = (5, 20)
_MODES = (Mode.TARGET_ONLY, Mode.STRICT)


@dataclass(frozen=True)
class GpuConfig:
    """Configuration of the measurements.

    Attributes:
        work: folder in which inflated bundles are kept.
        sizes: TARGET+DRAFT, names of `atspeed.training.inflation.SHAPES`.
        users: users whose lists are timed.
        hf_users: of these, the users whose lists Hugging Face makes too.
        repeats: repetitions of each single pass.
        beams, prompt_tokens, codes: of the search behind a long prompt.
    """

    provider: Provider
    precision: Precision
    work: Path
    sizes: Sequence[str] = SIZES
    widths: Sequence[int] = decode.WIDTHS
    users: int = 30
    hf_users: int = 5
    threads: int = 1
    repeats: int = 20
    new_tokens: Sequence[int] = NEW_TOKENS
    cached_tokens: Sequence[int] = CACHED_TOKENS
    beams: int = 256
    prompt_tokens: int = 1000
    codes: int = 3
    seed: int = 1

    @property
    def services(self) -> ServiceOptions:
        """Options of the services."""
        return ServiceOptions(threads=self.threads, provider=self.provider)


@dataclass(frozen=True)
class ExactRow:
    """Lists on the device, compared with target-only lists on the CPU."""

    mode: str
    k: int
    users: int
    identical: int
    near_ties: int
    different: int


@dataclass(frozen=True)
class SizeResult:
    """Measurements of one size. inflated_from: parameters of the trained models."""

    size: str
    bundle: str
    parameters: dict[str, int]
    inflated_from: dict[str, int]
    lists: Sequence[DecodeRow]
    passes: Sequence[PassRow]
    beams: BeamsRow


@dataclass(frozen=True)
class GpuResult:
    """Measurements of all sizes."""

    exact: Sequence[ExactRow]
    sizes: Sequence[SizeResult]

    @property
    def different(self) -> int:
        """Number of lists that differ beyond near-ties."""
        return sum(row.different for row in self.exact)


def check(config: GpuConfig) -> None:
    """Raise BenchmarkError if a size is not TARGET or TARGET+DRAFT, or if torch or onnxruntime cannot use the device."""
    if config.provider == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--provider cuda: this torch has no CUDA; see deploy/gpu-setup.sh")
    if config.provider == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise BenchmarkError("--provider cuda: this onnxruntime has no CUDA; see deploy/gpu-setup.sh")
    for size in config.sizes:
        parts = size.split("+")
        if len(parts) > 2 or not all(part in SHAPES for part in parts):
            raise BenchmarkError(f"--size {size}: must be TARGET or TARGET+DRAFT, each of {', '.join(SHAPES)}")


async def run(bundle: Bundle, histories: Sequence[History], config: GpuConfig) -> GpuResult:
    """Measure everything. Raises InflationError if the bundle's checkpoints are not in its parent folder."""
    exact = await exactness(bundle.root, histories, config)
    return GpuResult(exact, [await _size(size, bundle, histories, config) for size in config.sizes])


async def exactness(root: Path, histories: Sequence[History], config: GpuConfig) -> list[ExactRow]:
    """Compare target-only and strict on the device with target-only on the CPU."""
    variants = [(mode, k) for k in _EXACT_WIDTHS for mode in _MODES]
    expected = await _lists(
        root, histories, [(Mode.TARGET_ONLY, k) for k in _EXACT_WIDTHS], replace(config, provider="cpu")
    )
    found = await _lists(root, histories, variants, config)
    rows = []
    for mode, k in variants:
        verdicts = list(map(compare, found[mode, k], expected[Mode.TARGET_ONLY, k]))
        rows.append(ExactRow(str(mode), k, len(verdicts), **comparison_counts(verdicts)))
    return rows


async def _lists(
    root: Path, histories: Sequence[History], variants: Sequence[tuple[Mode, int]], config: GpuConfig
) -> dict[tuple[Mode, int], list[RankedList]]:
    found = {}
    with progress_bar() as progress:
        # Plans of a fixed size, because lists with speculation are compared: an adaptive planner may skip the draft.
        async with services(root, replace(config.services, planner="fixed")) as client:
            for mode, k in variants:
                requests = [RecommendRequest(history=own, k=k, beam_width=k, mode=mode) for own in histories]
                title = f"{config.provider}, {mode}, K = {k}"
                replies = await ask(client, requests, progress=progress, title=title)
                found[mode, k] = [RankedList.of(reply.items) for reply in replies]
    return found


async def _size(size: str, trained: Bundle, histories: Sequence[History], config: GpuConfig) -> SizeResult:
    folder = config.work / f"{size}-{config.precision}"
    bundle = inflated(size, trained, folder, config)
    decode_config = DecodeConfig(config.widths, _MODES, peer_users=min(config.hf_users, config.users), seed=config.seed)
    peers: list[Peer] = [_hugging_face(bundle, folder / "target-checkpoint", config)] if config.hf_users else []
    lists = await decode.run(
        bundle.root, histories[: config.users + decode_config.settle], decode_config, peers, config.services
    )
    peers.clear()
    _free()  # a device may hold the weights of one model only
    passes, beams = _passes(size, bundle, config)
    return SizeResult(
        size=size,
        bundle=bundle.manifest.name,
        parameters={role: model.parameters for role, model in bundle.manifest.models.items()},
        inflated_from={role: model.inflated_from or model.parameters for role, model in bundle.manifest.models.items()},
        lists=lists,
        passes=passes,
        beams=beams,
    )


def inflated(size: str, trained: Bundle, folder: Path, config: GpuConfig) -> Bundle:
    """Return the bundle at that size: the one that an earlier run left in the folder, or a new one."""
    try:
        kept = Bundle(folder / "bundle")
        if kept.manifest.catalogue_version == trained.manifest.catalogue_version:
            return kept
    except BundleError:
        pass
    target, _, draft = size.partition("+")
    run_folder = trained.root.resolve().parent
    inflations: dict[Role, Inflation] = {"target": Inflation(run_folder / "target-checkpoint", SHAPES[target])}
    if draft:
        inflations["draft"] = Inflation(run_folder / "draft-checkpoint", SHAPES[draft])
    label = size.replace("+", "-")
    inflate_bundle(trained, folder, inflations, label=label, precision=config.precision, seed=config.seed)
    return Bundle(folder / "bundle")


def _hugging_face(bundle: Bundle, checkpoint: Path, config: GpuConfig) -> Peer:
    model: Any = load_checkpoint(checkpoint)
    if config.precision == "float16":
        model = model.half()
    return HuggingFace(bundle, model.to(config.provider), threads=config.threads)


def _passes(size: str, bundle: Bundle, config: GpuConfig) -> tuple[list[PassRow], BeamsRow]:
    """Measure single passes of the target in this process."""
    name, entry = size.partition("+")[0], bundle.model("target")
    weights = bytes_read(SHAPES[name], entry.vocab_size, 2 if entry.precision == "float16" else 4)
    read_ms = 1e3 * weights / bytes_per_second(config.provider)
    options = RuntimeOptions(provider=config.provider, intra_op_threads=config.threads)
    decoder = load_decoder(bundle, "target", options)
    passes = probe_passes(
        name,
        decoder,
        entry.vocab_size,
        read_ms,
        new=config.new_tokens,
        cached=config.cached_tokens,
        repeats=config.repeats,
    )
    beams = probe_beams(
        name,
        decoder,
        entry.vocab_size,
        prompt=config.prompt_tokens,
        beams=config.beams,
        codes=config.codes,
        repeats=config.repeats,
    )
    return passes, beams


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def header(config: GpuConfig, *, histories: str) -> dict[str, Any]:
    """Return the header's fields."""
    asked = {name: value for name, value in asdict(config).items() if name != "work"}
    device = torch.cuda.get_device_name() if config.provider == "cuda" else "CPU"
    return {"benchmark": NAME, "histories": histories, "device": device, **asked}


def rows_to_json(result: GpuResult) -> list[dict[str, Any]]:
    """Return the rows of the result file: `kind` tells them apart, `size` names their size."""
    rows = to_json(result.exact, kind="exactness")
    for size in result.sizes:
        about = {"bundle": size.bundle, "parameters": size.parameters, "inflated_from": size.inflated_from}
        rows.append({"kind": "size", "size": size.size, **about})
        rows += to_json(size.lists, kind="decode", size=size.size)
        rows += to_json(size.passes, kind="pass", size=size.size)
        rows += to_json([size.beams], kind="beams", size=size.size)
    return rows


def file_name() -> str:
    """Return the name of today's result file."""
    return f"gpu-lists-{datetime.now(tz=UTC):%Y-%m-%d}.json"
