"""All that a GPU machine is wanted for, in one command: `atspeed bench gpu`; deploy/gpu-setup.sh prepares such a machine.

1. Exactness: the trained bundle's lists on the device, target-only and strict, are those of the CPU, in float32.
2. Time of a list at the size of large models: the bundle inflated to each shape, strict beside target-only, cold and warm, and
   Hugging Face `generate` on the same weights and device for some users.
3. Passes by themselves: against their tokens, beside one read of the weights; and a search of 256 beams for 3 codes behind a
   prompt of 1,000 tokens.

Everything runs on the CPU too, which is how the tests run it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from atspeed.benchmarks import decode
from atspeed.benchmarks.decode import Peer, Question
from atspeed.benchmarks.decode_peers import HuggingFace
from atspeed.benchmarks.decode_rows import DecodeRow
from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.model_probe import BeamsRow, PassRow, bytes_per_second, bytes_read, probe_beams, probe_passes
from atspeed.benchmarks.services import Running, ask, progress_bar, services
from atspeed.client.recommender import recommend_request
from atspeed.engine.bundle.manifest import Bundle, Precision, Role
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import Provider, RuntimeOptions, load_decoder
from atspeed.engine.search.list_comparison import RankedList, Verdict, compare
from atspeed.engine.search.mode import Mode
from atspeed.training.export import load_checkpoint
from atspeed.training.inflated_bundles import Inflation, inflate_bundle
from atspeed.training.inflation import SHAPES

NAME = "gpu"
SIZES = ("1.7b+68m", "7b+68m")
NEW_TOKENS = (1, 8, 20, 60, 120, 240, 480)
CACHED_TOKENS = (128, 1000)
_EXACT_WIDTHS = (5, 20)
_MODES = (Mode.TARGET_ONLY, Mode.STRICT)


@dataclass(frozen=True)
class Setup:
    """What to measure. sizes: TARGET+DRAFT, names of `atspeed.training.inflation.SHAPES`. work: where inflated bundles are kept.

    users: of the time of a list. hf_users: of them, those that Hugging Face answers.
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
    def running(self) -> Running:
        """How the services run."""
        return Running(threads=self.threads, provider=self.provider)


@dataclass(frozen=True)
class ExactRow:
    """Lists on the device beside those of target-only on the CPU."""

    mode: str
    k: int
    users: int
    identical: int
    near_ties: int
    different: int


@dataclass(frozen=True)
class SizeResult:
    """Of one size. inflated_from: parameters of the trained models."""

    size: str
    bundle: str
    parameters: dict[str, int]
    inflated_from: dict[str, int]
    lists: Sequence[DecodeRow]
    passes: Sequence[PassRow]
    beams: BeamsRow


@dataclass(frozen=True)
class Found:
    """Everything."""

    exact: Sequence[ExactRow]
    sizes: Sequence[SizeResult]

    @property
    def different(self) -> int:
        """Lists that differ beyond near-ties where identity is promised; in float16 rounding alone may do that."""
        return sum(row.different for row in self.exact)


def check(setup: Setup) -> None:
    """Raise BenchmarkError when a size is not TARGET or TARGET+DRAFT, or when torch or onnxruntime cannot use the device."""
    if setup.provider == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--provider cuda: this torch has no CUDA; see deploy/gpu-setup.sh")
    if setup.provider == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise BenchmarkError("--provider cuda: this onnxruntime has no CUDA; see deploy/gpu-setup.sh")
    for size in setup.sizes:
        parts = size.split("+")
        if len(parts) > 2 or not all(part in SHAPES for part in parts):
            raise BenchmarkError(f"--size {size}: must be TARGET or TARGET+DRAFT, each of {', '.join(SHAPES)}")


async def run(bundle: Bundle, histories: Sequence[History], setup: Setup) -> Found:
    """Measure everything. Raises InflationError where the bundle's checkpoints do not lie beside it."""
    exact = await exactness(bundle.root, histories, setup)
    return Found(exact, [await _size(size, bundle, histories, setup) for size in setup.sizes])


async def exactness(root: Path, histories: Sequence[History], setup: Setup) -> list[ExactRow]:
    """Target-only and strict on the device against target-only on the CPU."""
    ways = [(mode, k) for k in _EXACT_WIDTHS for mode in _MODES]
    expected = await _lists(
        root, histories, [(Mode.TARGET_ONLY, k) for k in _EXACT_WIDTHS], replace(setup, provider="cpu")
    )
    found = await _lists(root, histories, ways, setup)
    rows = []
    for mode, k in ways:
        verdicts = list(map(compare, found[mode, k], expected[Mode.TARGET_ONLY, k]))
        counts = [verdicts.count(verdict) for verdict in (Verdict.IDENTICAL, Verdict.NEAR_TIE, Verdict.DIFFERENT)]
        rows.append(ExactRow(str(mode), k, len(verdicts), *counts))
    return rows


async def _lists(
    root: Path, histories: Sequence[History], ways: Sequence[tuple[Mode, int]], setup: Setup
) -> dict[tuple[Mode, int], list[RankedList]]:
    found = {}
    with progress_bar() as progress:
        # Plans of a fixed size: it is strict lists of speculation that have to be exact, and where none pays there would be none.
        async with services(root, replace(setup.running, planner="fixed")) as client:
            for mode, k in ways:
                requests = [recommend_request(history=own, k=k, beam_width=k, mode=mode) for own in histories]
                title = f"{setup.provider}, {mode}, K = {k}"
                replies = await ask(client, requests, progress=progress, title=title)
                found[mode, k] = [RankedList.of(reply.items) for reply in replies]
    return found


async def _size(size: str, trained: Bundle, histories: Sequence[History], setup: Setup) -> SizeResult:
    folder = setup.work / f"{size}-{setup.precision}"
    bundle = inflated(size, trained, folder, setup)
    question = Question(setup.widths, _MODES, peer_users=min(setup.hf_users, setup.users), seed=setup.seed)
    peers: list[Peer] = [_hugging_face(bundle, folder / "target-checkpoint", setup)] if setup.hf_users else []
    lists = await decode.run(bundle.root, histories[: setup.users + question.settle], question, peers, setup.running)
    peers.clear()
    _free()  # the weights of one model are as much as a device may hold
    passes, beams = _passes(size, bundle, setup)
    return SizeResult(
        size=size,
        bundle=bundle.manifest.name,
        parameters={role: model.parameters for role, model in bundle.manifest.models.items()},
        inflated_from={role: model.inflated_from or model.parameters for role, model in bundle.manifest.models.items()},
        lists=lists,
        passes=passes,
        beams=beams,
    )


def inflated(size: str, trained: Bundle, folder: Path, setup: Setup) -> Bundle:
    """The bundle at that size: the one that an earlier run left in the folder, or a new one."""
    try:
        kept = Bundle(folder / "bundle")
        if kept.manifest.catalogue_version == trained.manifest.catalogue_version:
            return kept
    except BundleError:
        pass
    target, _, draft = size.partition("+")
    beside = trained.root.resolve().parent
    inflations: dict[Role, Inflation] = {"target": Inflation(beside / "target-checkpoint", SHAPES[target])}
    if draft:
        inflations["draft"] = Inflation(beside / "draft-checkpoint", SHAPES[draft])
    label = size.replace("+", "-")
    inflate_bundle(trained, folder, inflations, label=label, precision=setup.precision, seed=setup.seed)
    return Bundle(folder / "bundle")


def _hugging_face(bundle: Bundle, checkpoint: Path, setup: Setup) -> Peer:
    model: Any = load_checkpoint(checkpoint)
    if setup.precision == "float16":
        model = model.half()
    return HuggingFace(bundle, model.to(setup.provider), threads=setup.threads)


def _passes(size: str, bundle: Bundle, setup: Setup) -> tuple[list[PassRow], BeamsRow]:
    """The target alone, in this process."""
    name, entry = size.partition("+")[0], bundle.model("target")
    weights = bytes_read(SHAPES[name], entry.vocab_size, 2 if entry.precision == "float16" else 4)
    read_ms = 1e3 * weights / bytes_per_second(setup.provider)
    options = RuntimeOptions(provider=setup.provider, intra_op_threads=setup.threads)
    decoder = load_decoder(bundle, "target", options)
    passes = probe_passes(
        name,
        decoder,
        entry.vocab_size,
        read_ms,
        new=setup.new_tokens,
        cached=setup.cached_tokens,
        repeats=setup.repeats,
    )
    beams = probe_beams(
        name,
        decoder,
        entry.vocab_size,
        prompt=setup.prompt_tokens,
        beams=setup.beams,
        codes=setup.codes,
        repeats=setup.repeats,
    )
    return passes, beams


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def header(setup: Setup, *, histories: str) -> dict[str, Any]:
    """What was asked for, beside where it comes from, and the device."""
    asked = {name: value for name, value in asdict(setup).items() if name != "work"}
    device = torch.cuda.get_device_name() if setup.provider == "cuda" else "CPU"
    return {"benchmark": NAME, "histories": histories, "device": device, **asked}


def to_json(found: Found) -> list[dict[str, Any]]:
    """The rows, for a result file; `kind` tells them apart, `size` whose they are."""
    return list(_rows(found))


def _rows(found: Found) -> Iterator[dict[str, Any]]:
    yield from ({"kind": "exactness", **asdict(row)} for row in found.exact)
    for size in found.sizes:
        about = {"bundle": size.bundle, "parameters": size.parameters, "inflated_from": size.inflated_from}
        yield {"kind": "size", "size": size.size, **about}
        yield from ({"kind": "decode", "size": size.size, **asdict(row)} for row in size.lists)
        yield from ({"kind": "pass", "size": size.size, **asdict(row)} for row in size.passes)
        yield {"kind": "beams", "size": size.size, **asdict(size.beams)}


def file_name() -> str:
    """Of today's result."""
    return f"gpu-{datetime.now(tz=UTC):%Y-%m-%d}.json"
