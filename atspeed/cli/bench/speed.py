"""`atspeed bench decode`, `overhead` and `gpu`: what a list takes beside other engines, what services add, and all on a GPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from atspeed.benchmarks.decode_rows import Prefix
from atspeed.cli.bench.options import (
    Histories,
    JsonFile,
    LeastItems,
    MostItems,
    Page,
    Seed,
    Tolerance,
    Users,
    save,
    written,
)
from atspeed.cli.options import MAX_THREADS, MAX_USERS, MAX_WIDTH, BundleFolder, CommandError, optional, out
from atspeed.engine.bundle.manifest import Bundle
from atspeed.engine.model.decoder import Provider
from atspeed.engine.search.mode import Mode
from atspeed.rpc import event_loop
from orchestrator.planning.planner import PlannerKind

if TYPE_CHECKING:
    from atspeed.benchmarks.decode import Peer
    from atspeed.benchmarks.decode_rows import DecodeRow

Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_THREADS, help="Threads of each model and of the peers; all cores by default."),
]


GpuPrecision = Literal["float32", "float16"]
RunsOn = Annotated[Provider, typer.Option("--provider", help="Where the models run.")]
Widths = Annotated[
    list[int] | None,
    typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 1 3 5 10 20 50]"),
]
Planner = Annotated[PlannerKind, typer.Option(help="Plans of the size that pays, or of a fixed one.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="What the target was exported from: Hugging Face generate is measured beside it.",
        exists=True,
        file_okay=False,
    ),
]
GenAi = Annotated[
    bool, typer.Option("--genai", help="Measure onnxruntime-genai too (extra `bench`); needs --checkpoint.")
]
PeerUsers = Annotated[
    int | None,
    typer.Option("--hf-users", min=0, max=MAX_USERS, help="How many of them the other engines answer; all by default."),
]


def bench_decode(
    bundle: BundleFolder,
    checkpoint: Checkpoint = None,
    genai: GenAi = False,
    histories: Histories = None,
    users: Users = 50,
    peer_users: PeerUsers = None,
    least_items: LeastItems = 2,
    most_items: MostItems = None,
    k: Widths = None,
    mode: Annotated[list[Mode] | None, typer.Option(help="How lists are made.  [default: all]")] = None,
    prefix: Annotated[list[Prefix] | None, typer.Option(help="[default: both]")] = None,
    tolerance: Tolerance = 0.1,
    perfect: Annotated[
        bool, typer.Option("--perfect/--no-perfect", help="Measure plans that are perfect and free: the limit.")
    ] = True,
    settle: Annotated[
        int, typer.Option(min=1, max=MAX_USERS, help="Users before these who do not count: the planner learns.")
    ] = 3,
    planner: Planner = PlannerKind.ADAPTIVE,
    threads: Threads = None,
    provider: RunsOn = "cpu",
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: Page = None,
) -> None:
    """Time of a list by mode, K and prefix, beside Hugging Face generate; exits with 1 when a list differs."""
    from atspeed.benchmarks import decode, decode_rows
    from atspeed.benchmarks.histories import choose_histories
    from atspeed.benchmarks.services import Running

    if genai and checkpoint is None:
        raise typer.BadParameter("--genai needs --checkpoint: the weights that it is to run")
    page = optional("atspeed.benchmarks.decode_report") if report else None  # what is missing is said before the work
    opened = Bundle(bundle)
    catalogue, wanted = opened.catalogue(), settle + users
    chosen = choose_histories(catalogue, histories, wanted, seed, least_items=least_items, most_items=most_items)
    if (users := len(chosen) - settle) < 1:
        raise CommandError(f"--settle {settle}: there are only {len(chosen)} users with so many items")
    running = Running(threads=threads or os.cpu_count() or 1, provider=provider, planner=planner.value)
    question = decode.Question(
        widths=k or decode.WIDTHS,
        modes=mode or decode.MODES,
        prefixes=prefix or list(Prefix),
        tolerance=tolerance,
        peer_users=users if peer_users is None else min(peer_users, users),
        perfect=perfect,
        settle=settle,
        seed=seed,
    )
    with _peers(opened, checkpoint, genai=genai, threads=running.threads or 1, provider=provider) as peers:
        rows = event_loop.run(decode.run(bundle, chosen, question, peers, running))
        about = decode.header(question, peers, running, users=users, items=(least_items, most_items))
    about["histories"] = histories.name if histories else "random items"
    out.print(decode_rows.table(rows))
    result = save(json_file, opened, seed, decode_rows.to_json(rows), about)
    if page and report:
        written(page.write(result, report))
    _check(rows)


def bench_overhead(
    bundle: BundleFolder,
    histories: Histories = None,
    users: Users = 50,
    least_items: LeastItems = 2,
    most_items: MostItems = None,
    k: Annotated[
        list[int] | None, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 5 10 20]")
    ] = None,
    threads: Threads = None,
    provider: RunsOn = "cpu",
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: Page = None,
) -> None:
    """What gRPC, orchestrator and Redis add to the time of the models, for returning users."""
    overhead = optional("atspeed.benchmarks.overhead")
    from atspeed.benchmarks.histories import choose_histories
    from atspeed.benchmarks.services import Running

    opened = Bundle(bundle)
    catalogue = opened.catalogue()
    chosen = choose_histories(catalogue, histories, users, seed, least_items=least_items, most_items=most_items)
    running = Running(threads=threads or os.cpu_count() or 1, provider=provider)
    rows = event_loop.run(overhead.run(bundle, chosen, k or overhead.WIDTHS, running))
    out.print(overhead.table(rows))
    named = histories.name if histories else "random items"
    about = overhead.header(running, users=len(chosen), items=(least_items, most_items), histories=named)
    result = save(json_file, opened, seed, overhead.to_json(rows), about)
    if report:
        written(overhead.write(result, report))


def bench_gpu(
    bundle: Annotated[
        Path,
        typer.Option(
            "--bundle",
            help="A bundle that `atspeed train` wrote, beside its checkpoints.",
            exists=True,
            file_okay=False,
        ),
    ],
    work: Annotated[Path, typer.Option(help="Folder for inflated bundles, which are kept; 40 GB.", file_okay=False)],
    histories: Histories = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="TARGET+DRAFT", help="Shapes of `atspeed inflate`.  [default: 1.7b+68m 7b+68m]"),
    ] = None,
    precision: Annotated[GpuPrecision, typer.Option(help="Of inflated weights.")] = "float16",
    provider: RunsOn = "cuda",
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Users whose lists are timed.")] = 30,
    exact_users: Annotated[
        int, typer.Option(min=1, max=MAX_USERS, help="Users whose lists are compared with the CPU's.")
    ] = 100,
    hf_users: Annotated[
        int, typer.Option(min=0, max=MAX_USERS, help="Of the users, those that Hugging Face answers.")
    ] = 5,
    k: Widths = None,
    beams: Annotated[int, typer.Option(min=1, max=MAX_WIDTH, help="Beams of the search behind a long prompt.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Tokens of that prompt.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, max=1_000_000, help="Of every pass that is timed by itself.")] = 20,
    threads: Threads = None,
    seed: Seed = 1,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for gpu-DATE.json.", file_okay=False)] = Path(
        "docs/benchmarks"
    ),
) -> None:
    """All that a GPU is wanted for: exactness beside the CPU, lists and passes at the size of large models."""
    gpu = optional("atspeed.benchmarks.gpu")
    from atspeed.benchmarks import decode_rows
    from atspeed.benchmarks.histories import choose_histories

    optional("transformers.utils.logging").disable_progress_bar()
    opened = Bundle(bundle)
    setup = gpu.Setup(
        provider=provider,
        precision=precision,
        work=work,
        sizes=size or gpu.SIZES,
        widths=k or gpu.decode.WIDTHS,
        users=users,
        hf_users=hf_users,
        threads=threads or os.cpu_count() or 1,
        repeats=repeats,
        beams=beams,
        prompt_tokens=prompt_tokens,
        seed=seed,
    )
    gpu.check(setup)
    chosen = choose_histories(opened.catalogue(), histories, max(users + 1, exact_users), seed, least_items=2)
    found = event_loop.run(gpu.run(opened, chosen, setup))
    for one in found.sizes:
        out.print(f"{one.size}, inflated", highlight=False)
        out.print(decode_rows.table(one.lists))
    about = gpu.header(setup, histories=histories.name if histories else "random items")
    save(out_folder / gpu.file_name(), opened, seed, gpu.to_json(found), about)
    if found.different:
        raise CommandError(f"{found.different} lists on {provider} differ from the CPU's beyond near-ties")


@contextmanager
def _peers(
    bundle: Bundle, checkpoint: Path | None, *, genai: bool, threads: int, provider: Provider
) -> Iterator[Sequence[Peer]]:
    """The other engines, loaded."""
    if checkpoint is None:
        yield []
        return
    others, exporter = optional("atspeed.benchmarks.decode_peers"), optional("atspeed.training.export")
    optional("transformers.utils.logging").disable_progress_bar()
    with ExitStack() as stack:
        model = exporter.load_checkpoint(checkpoint).to(provider)
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
