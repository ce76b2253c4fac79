"""`atspeed bench load` and `atspeed bench scaling`: what the services do under load, and what grows with what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atspeed.cli.bench.options import Histories, JsonFile, Page, Seed, save, written
from atspeed.cli.options import (
    MAX_EXCLUDED,
    MAX_REPLICAS,
    MAX_THREADS,
    MAX_USERS,
    MAX_WIDTH,
    BundleFolder,
    optional,
    out,
)
from atspeed.engine.bundle.manifest import Bundle
from atspeed.rpc import event_loop

Threads = Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="Threads of a pass of the target.")]


def bench_load(
    bundle: BundleFolder,
    histories: Histories = None,
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="How many users' histories.")] = 2000,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.")] = 10,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            min=0.1, max=1_000_000, help="Requests per second.  [default: shares of the bare runner's throughput]"
        ),
    ] = None,
    replicas: Annotated[
        list[int] | None,
        typer.Option(min=1, max=MAX_REPLICAS, help="Target replicas, measured one after the other.  [default: 1 2]"),
    ] = None,
    mix: Annotated[str, typer.Option(help="Shares of users.")] = "new=0.2,returning=0.5,refreshing=0.3",
    seconds: Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds of each rate.")] = 15.0,
    settle: Annotated[float, typer.Option(min=0, max=86_400, help="Seconds before these that do not count.")] = 5.0,
    unloaded: Annotated[
        int, typer.Option(min=1, max=MAX_USERS, help="Requests one after the other, for the unloaded latency.")
    ] = 60,
    bare: Annotated[
        int, typer.Option(min=1, max=MAX_USERS, help="Searches of each closed loop of the bare runner.")
    ] = 120,
    threads: Threads = 1,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: Page = None,
) -> None:
    """Latency and goodput of the real services at rising rates, target-only and strict side by side."""
    from atspeed.benchmarks import load
    from atspeed.benchmarks.arrivals import Mix
    from atspeed.benchmarks.histories import choose_histories

    page = optional("atspeed.benchmarks.load_report") if report else None  # what is missing is said before the work
    opened = Bundle(bundle)
    question = load.Question(
        k=k,
        mix=Mix.parse(mix),
        seconds=seconds,
        settle=settle,
        seed=seed,
        replicas=replicas or (1, 2),
        rates=rate,
        unloaded=unloaded,
        bare=bare,
        threads=threads,
    )
    chosen = choose_histories(opened.catalogue(), histories, users, seed)
    found = event_loop.run(load.run(bundle, chosen, question))
    out.print(load.table(found))
    data = histories.name if histories else "random items"
    result = save(json_file, opened, seed, load.to_json(found.rows), load.header(found, question, data=data))
    if page and report:
        written(page.write(result, report))


def bench_scaling(
    items: Annotated[
        list[int] | None,
        typer.Option(min=2, max=100_000_000, help="Items of a catalogue.  [default: 10^4 10^5 10^6 10^7]"),
    ] = None,
    codebook: Annotated[int, typer.Option(min=2, max=65_536, help="Codes of each of its four levels.")] = 256,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams.")] = 20,
    excluded: Annotated[int, typer.Option(min=1, max=MAX_EXCLUDED, help="Items that a request excludes.")] = 10_000,
    bundle: Annotated[
        Path | None, typer.Option(help="Measure searches of this bundle's target too.", exists=True, file_okay=False)
    ] = None,
    width: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX_WIDTH, help="Beams of its searches.  [default: 1 5 10 20 50]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Users of each of its measurements.")] = 15,
    threads: Threads = 1,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: Page = None,
) -> None:
    """Load time, memory and selection against the size of the catalogue; searches against beams and prompt length."""
    from atspeed.benchmarks import scaling

    page = optional("atspeed.benchmarks.scaling_report") if report else None
    opened = Bundle(bundle) if bundle else None
    question = scaling.CatalogueQuestion(items or scaling.SIZES, codebook, k, excluded, seed)
    asked = scaling.SearchQuestion(width or scaling.WIDTHS, k, repeats, threads, seed) if opened else None
    catalogues = scaling.measure_catalogues(question)
    searches = event_loop.run(scaling.measure_searches(opened.root, asked)) if opened and asked else []
    for shown in scaling.tables(catalogues, searches):
        out.print(shown)
    result = save(json_file, opened, seed, scaling.to_json(catalogues, searches), scaling.header(question, asked))
    if page and report:
        written(page.write(result, report))
