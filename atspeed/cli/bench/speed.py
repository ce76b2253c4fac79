"""`atspeed bench decode`, `overhead`, `http`, `prefix`, `events`, `batch`: speed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atspeed.benchmarks import decode_rows
from atspeed.benchmarks.decode_rows import Prefix
from atspeed.benchmarks.histories import choose_histories
from atspeed.benchmarks.results import terminal_table, to_json
from atspeed.benchmarks.services import ServiceOptions
from atspeed.cli.bench.options import (
    Histories,
    JsonFile,
    LeastItems,
    MostItems,
    PageFolder,
    Seed,
    Tolerance,
    Users,
    save,
    source_of,
)
from atspeed.cli.bench.options import Threads as PassThreads
from atspeed.cli.options import MAX_THREADS, MAX_USERS, MAX_WIDTH, BundleFolder, CommandError, optional, out
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.model.provider import Provider
from atspeed.engine.search.mode import Mode
from atspeed.rpc import event_loop
from orchestrator.planning.planner import PlannerKind

if TYPE_CHECKING:
    from atspeed.benchmarks.decode import Peer

Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_THREADS, help="Threads of each model and of the other engines; all cores by default."),
]


RunsOn = Annotated[Provider, typer.Option("--provider", help="Device of the models.")]
Widths = Annotated[
    list[int] | None,
    typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 1 3 5 10 20 50]"),
]
Planner = Annotated[PlannerKind, typer.Option(help="Plans of an adaptive or of a fixed size.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint that the target was exported from. With it, Hugging Face generate is measured too.",
        exists=True,
        file_okay=False,
    ),
]
GenAi = Annotated[
    bool, typer.Option("--genai", help="Measure onnxruntime-genai too (extra `bench`); needs --checkpoint.")
]
PeerUsers = Annotated[
    int | None,
    typer.Option("--hf-users", min=0, max=MAX_USERS, help="Users whose lists the other engines make; all by default."),
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
    mode: Annotated[list[Mode] | None, typer.Option(help="Modes.  [default: all]")] = None,
    prefix: Annotated[list[Prefix] | None, typer.Option(help="[default: both]")] = None,
    tolerance: Tolerance = 0.1,
    perfect: Annotated[
        bool, typer.Option("--perfect/--no-perfect", help="Measure oracle plans too: the upper bound of speculation.")
    ] = True,
    settle: Annotated[
        int, typer.Option(min=1, max=MAX_USERS, help="Users before these, who are not counted: the planner learns.")
    ] = 3,
    planner: Planner = PlannerKind.ADAPTIVE,
    threads: Threads = None,
    provider: RunsOn = "cpu",
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Measure the time of a list by mode, K and prefix, and of other engines; exits with 1 if a list differs."""
    from atspeed.benchmarks import decode

    if genai and checkpoint is None:
        raise typer.BadParameter("--genai needs --checkpoint, the weights that it runs")
    opened = Bundle(bundle)
    catalogue, wanted = opened.catalogue(), settle + users
    chosen = choose_histories(catalogue, histories, wanted, seed, least_items=least_items, most_items=most_items)
    if (users := len(chosen) - settle) < 1:
        raise CommandError(f"--settle {settle}: there are only {len(chosen)} users with so many items")
    options = ServiceOptions(threads=threads or os.cpu_count() or 1, provider=provider, planner=planner.value)
    config = decode.DecodeConfig(
        widths=k or decode.WIDTHS,
        modes=mode or decode.MODES,
        prefixes=prefix or list(Prefix),
        tolerance=tolerance,
        peer_users=users if peer_users is None else min(peer_users, users),
        perfect=perfect,
        settle=settle,
        seed=seed,
    )
    with _peers(opened, checkpoint, genai=genai, threads=options.threads or 1, provider=provider) as peers:
        rows = event_loop.run(decode.run(bundle, chosen, config, peers, options))
        about = decode.header(config, peers, options, users=users, items=(least_items, most_items))
    about["histories"] = source_of(histories)
    out.print(decode_rows.table(rows))
    save(json_file, opened, seed, to_json(rows), about, page=(report, "atspeed.benchmarks.decode_report"))
    if different := sum(row.different or 0 for row in rows if row.promises_identity):
        raise CommandError(f"{different} lists differ from the target's own beyond near-ties")


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
    report: PageFolder = None,
) -> None:
    """Measure what gRPC, orchestrator and Redis add to the models' time, for returning users."""
    from atspeed.benchmarks import overhead

    opened = Bundle(bundle)
    catalogue = opened.catalogue()
    chosen = choose_histories(catalogue, histories, users, seed, least_items=least_items, most_items=most_items)
    options = ServiceOptions(threads=threads or os.cpu_count() or 1, provider=provider)
    rows = event_loop.run(overhead.run(bundle, chosen, k or overhead.WIDTHS, options))
    title = f"Added to the models' time, {len(chosen)} returning users; ms"
    out.print(terminal_table(title, overhead.COLUMNS, rows))
    about = overhead.header(options, users=len(chosen), items=(least_items, most_items), histories=source_of(histories))
    save(json_file, opened, seed, to_json(rows), about, page=(report, "atspeed.benchmarks.overhead"))


def bench_http(
    bundle: BundleFolder,
    histories: Histories = None,
    users: Users = 50,
    least_items: LeastItems = 2,
    most_items: MostItems = None,
    k: Annotated[
        list[int] | None, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 10 20 50]")
    ] = None,
    threads: Threads = None,
    provider: RunsOn = "cpu",
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Measure a list over HTTP/JSON by Envoy (extra `http`) beside the same list over gRPC."""
    from atspeed.benchmarks import http_calls

    opened = Bundle(bundle)
    catalogue = opened.catalogue()
    chosen = choose_histories(catalogue, histories, users, seed, least_items=least_items, most_items=most_items)
    options = ServiceOptions(threads=threads or os.cpu_count() or 1, provider=provider)
    rows = http_calls.run(bundle, chosen, k or http_calls.WIDTHS, options)
    out.print(terminal_table(f"The same list in three ways, {len(chosen)} users; ms", http_calls.COLUMNS, rows))
    items = (least_items, most_items)
    about = http_calls.header(options, users=len(chosen), items=items, histories=source_of(histories))
    save(json_file, opened, seed, to_json(rows), about, page=(report, "atspeed.benchmarks.http_calls"))


def bench_batch(
    bundle: BundleFolder,
    histories: Histories = None,
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Users of each turn.")] = 500,
    turns: Annotated[int, typer.Option(min=1, max=100, help="Turns of each way.")] = 3,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.")] = 20,
    concurrency: Annotated[int, typer.Option(min=1, max=1_024, help="Lists at once.")] = 16,
    threads: Threads = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Measure the lists a second of `atspeed batch` beside the bare searches of the same models."""
    from atspeed.benchmarks import batch as measured

    opened = Bundle(bundle)
    config = measured.BatchConfig(k, users, turns, concurrency, threads or os.cpu_count() or 1)
    chosen = choose_histories(opened.catalogue(), histories, users * turns, seed)
    rows = event_loop.run(measured.run(bundle, chosen, config))
    out.print(terminal_table(f"Lists of {users} users a turn, K = {k}", measured.COLUMNS, rows))
    about = {**measured.header(config), "histories": source_of(histories)}
    save(json_file, opened, seed, to_json(rows), about)


def bench_ray(
    bundle: BundleFolder,
    histories: Histories = None,
    workers: Annotated[
        list[int] | None, typer.Option(min=1, max=64, help="Workers of one thread each.  [default: 1 2]")
    ] = None,
    users: Annotated[int, typer.Option(min=512, max=MAX_USERS, help="Users of each job.")] = 4_096,
    turns: Annotated[int, typer.Option(min=1, max=100, help="Jobs for each number of workers.")] = 3,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.")] = 20,
    concurrency: Annotated[int, typer.Option(min=1, max=1_024, help="Lists at once in a worker.")] = 16,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Measure the lists a second of a Ray Data job (extra `ray`) by its number of workers."""
    from atspeed.benchmarks import ray_batch as measured

    optional("ray.data")
    opened, config = Bundle(bundle), measured.RayConfig(k, users, turns, concurrency)
    chosen = choose_histories(opened.catalogue(), histories, users, seed)
    if len(chosen) < users:
        raise CommandError(f"--users: {users} histories are needed, and {len(chosen)} were found")
    rows = measured.run(bundle, chosen, workers or (1, 2), config)
    out.print(terminal_table(f"Lists of {users} users a turn, K = {k}", measured.COLUMNS, rows))
    about = {**measured.header(config), "histories": source_of(histories)}
    save(json_file, opened, seed, to_json(rows), about)


def bench_events(
    bundle: BundleFolder,
    events: Annotated[int, typer.Option(min=1, max=10_000_000, help="Events of each way.")] = 10_000,
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Users who share them.")] = 1_000,
    batch: Annotated[int, typer.Option(min=2, max=10_000, help="Events of one RecordEventsBatch.")] = 1_000,
    concurrency: Annotated[int, typer.Option(min=1, max=1_024, help="Calls at once.")] = 8,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Measure how many events a second one orchestrator records, one by one and in batches."""
    from atspeed.benchmarks import events as measured

    config, options = measured.EventsConfig(events, users, batch, concurrency, seed), ServiceOptions()
    rows = event_loop.run(measured.run(bundle, config, options))
    out.print(terminal_table(f"Events of {users} users", measured.COLUMNS, rows))
    save(json_file, Bundle(bundle), seed, to_json(rows), measured.header(config, options))


def bench_prefix(
    bundle: BundleFolder,
    users: Users = 100,
    histories: Histories = None,
    least_items: LeastItems = 2,
    most_items: MostItems = None,
    draft: Annotated[bool, typer.Option("--draft", help="Measure the draft instead of the target.")] = False,
    nodes: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            max=8_192,
            help="Trie nodes in a pass, besides the root; each is measured by itself.  [default: 0 120]",
        ),
    ] = None,
    threads: PassThreads = 1,
    block_tokens: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="Prompt tokens in one block; those of an item without it.")
    ] = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Measure a request's first pass with its prompt cold, in memory or in Redis; exits with 1 if evaluations differ."""
    from atspeed.benchmarks import prefix

    opened = Bundle(bundle)
    if draft and opened.manifest.draft is None:
        raise CommandError("--draft: the bundle has no draft")
    config = prefix.PrefixConfig("draft" if draft else "target", tuple(nodes or (0, 120)), threads, block_tokens, seed)
    catalogue = opened.catalogue()
    chosen = choose_histories(catalogue, histories, users, seed, least_items=least_items, most_items=most_items)
    rows = event_loop.run(prefix.run(opened, chosen, config))
    out.print(terminal_table("First passes by prefix", prefix.TERMINAL_COLUMNS, rows))
    about = prefix.header(config, items=(least_items, most_items), histories=source_of(histories))
    save(json_file, opened, seed, to_json(rows), about, page=(report, "atspeed.benchmarks.prefix"))
    if wrong := [row.state for row in rows if not row.is_same]:
        raise CommandError(f"evaluations differ from the cold one's: {', '.join(wrong)}")


@contextmanager
def _peers(
    bundle: Bundle, checkpoint: Path | None, *, genai: bool, threads: int, provider: Provider
) -> Iterator[Sequence[Peer]]:
    """Load the other engines."""
    if checkpoint is None:
        yield []
        return
    others, pretrained = optional("atspeed.benchmarks.decode_peers"), optional("atspeed.training.pretrained")
    optional("transformers.utils.logging").disable_progress_bar()
    with ExitStack() as stack:
        model = pretrained.load_checkpoint(checkpoint).to(provider)
        peers: list[Peer] = [others.HuggingFace(bundle, model, threads=threads)]
        if genai:
            optional("onnxruntime_genai")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="atspeed-genai-")))
            built = stack.enter_context(others.built_for_genai(checkpoint, folder / "genai", threads=threads))
            peers.append(others.GenAi(bundle, built, threads=threads))
        yield peers
