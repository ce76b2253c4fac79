"""`atspeed bench decode` and `atspeed bench overhead`: what a list takes beside other engines, and what services add to it."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.bench_cli import Histories, JsonFile, Seed, save, written
from client.cli_parts import BundleFolder, CommandError, optional, out
from client.recommender import Mode
from engine.bundle import Bundle

if TYPE_CHECKING:
    from benchmarks.decode import DecodeRow, Peer

Page = Annotated[Path | None, typer.Option("--report", help="Write a page about it into this folder.", file_okay=False)]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of each model and of the peers; all cores by default.")
]
LeastItems = Annotated[
    int, typer.Option("--min-items", min=2, help="Only users with so many items: one comes after the prefix is kept.")
]


class PrefixChoice(StrEnum):
    """What the services know of a prompt."""

    COLD = "cold"
    WARM = "warm"


class ProviderChoice(StrEnum):
    """Where the models run."""

    CPU = "cpu"
    CUDA = "cuda"


Provider = Annotated[ProviderChoice, typer.Option(help="Where the models run.")]


def bench_decode(
    bundle: BundleFolder,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="What the target was exported from: Hugging Face generate is measured beside it."),
    ] = None,
    genai: Annotated[
        bool, typer.Option("--genai", help="Measure onnxruntime-genai too (extra `bench`); needs --checkpoint.")
    ] = False,
    histories: Histories = None,
    users: Annotated[int, typer.Option(min=1, help="How many users.")] = 50,
    peer_users: Annotated[
        int | None, typer.Option("--hf-users", min=0, help="How many of them the other engines answer; all by default.")
    ] = None,
    least_items: LeastItems = 2,
    k: Annotated[
        list[int] | None, typer.Option("--k", "-k", min=1, help="Beams and items.  [default: 1 3 5 10 20 50]")
    ] = None,
    mode: Annotated[list[Mode] | None, typer.Option(help="How lists are made.  [default: all]")] = None,
    prefix: Annotated[list[PrefixChoice] | None, typer.Option(help="[default: both]")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Mode tolerance: largest score gap.")] = 0.1,
    threads: Threads = None,
    provider: Provider = ProviderChoice.CPU,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: Page = None,
) -> None:
    """Time of a list by mode, K and prefix, beside Hugging Face generate; exits with 1 when a list differs."""
    from benchmarks import decode
    from benchmarks.histories import choose_histories
    from benchmarks.services import Running

    if genai and checkpoint is None:
        raise typer.BadParameter("--genai needs --checkpoint: the weights that it is to run")
    page = optional("benchmarks.decode_report") if report else None  # what is missing is said before the work
    opened = Bundle(bundle)
    chosen = choose_histories(opened.catalogue(), histories, users, seed, least_items=least_items)
    running = Running(threads=threads or os.cpu_count() or 1, provider=provider.value)
    question = decode.Question(
        widths=k or decode.WIDTHS,
        modes=mode or decode.MODES,
        prefixes=[decode.Prefix(choice.value) for choice in prefix or PrefixChoice],
        tolerance=tolerance,
        peer_users=len(chosen) if peer_users is None else min(peer_users, len(chosen)),
        seed=seed,
    )
    with _peers(opened, checkpoint, genai=genai, threads=running.threads or 1, provider=provider) as peers:
        rows = asyncio.run(decode.run(bundle, chosen, question, peers, running))
        about = decode.header(question, peers, running, users=len(chosen), least_items=least_items)
    about["histories"] = histories.name if histories else "random items"
    out.print(decode.table(rows))
    result = save(json_file, opened, seed, decode.to_json(rows), about)
    if page and report:
        written(page.write(result, report))
    _check(rows)


def bench_overhead(
    bundle: BundleFolder,
    histories: Histories = None,
    users: Annotated[int, typer.Option(min=1, help="How many users.")] = 50,
    least_items: LeastItems = 2,
    k: Annotated[
        list[int] | None, typer.Option("--k", "-k", min=1, help="Beams and items.  [default: 5 10 20]")
    ] = None,
    threads: Threads = None,
    provider: Provider = ProviderChoice.CPU,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: Page = None,
) -> None:
    """What gRPC, orchestrator and Redis add to the time of the models, for returning users."""
    overhead = optional("benchmarks.overhead")
    from benchmarks.histories import choose_histories
    from benchmarks.services import Running

    opened = Bundle(bundle)
    chosen = choose_histories(opened.catalogue(), histories, users, seed, least_items=least_items)
    running = Running(threads=threads or os.cpu_count() or 1, provider=provider.value)
    rows = asyncio.run(overhead.run(bundle, chosen, k or overhead.WIDTHS, running))
    out.print(overhead.table(rows))
    named = histories.name if histories else "random items"
    about = overhead.header(running, users=len(chosen), least_items=least_items, histories=named)
    result = save(json_file, opened, seed, overhead.to_json(rows), about)
    if report:
        written(overhead.write(result, report))


@contextmanager
def _peers(
    bundle: Bundle, checkpoint: Path | None, *, genai: bool, threads: int, provider: ProviderChoice
) -> Iterator[Sequence[Peer]]:
    """The other engines, loaded."""
    if checkpoint is None:
        yield []
        return
    others, exporter = optional("benchmarks.decode_peers"), optional("training.export")
    optional("transformers.utils.logging").disable_progress_bar()
    with ExitStack() as stack:
        model = exporter.load_checkpoint(checkpoint).to(provider.value)
        peers: list[Peer] = [others.HuggingFace(bundle, model, threads=threads)]
        if genai:
            optional("onnxruntime_genai")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="atspeed-genai-")))
            built = stack.enter_context(others.built_for_genai(checkpoint, folder / "genai", threads=threads))
            peers.append(others.GenAi(bundle, built, threads=threads))
        yield peers


def _check(rows: Sequence[DecodeRow]) -> None:
    """Raise CommandError when lists differ that must not."""
    if different := sum(row.different or 0 for row in rows if row.promises_identity):
        raise CommandError(f"{different} lists differ from the target's own beyond near-ties")
