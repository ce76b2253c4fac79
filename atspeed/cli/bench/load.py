"""`atspeed bench load` and `scaling`: latency under load, and scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atspeed.benchmarks.arrivals import Mix
from atspeed.benchmarks.histories import choose_histories
from atspeed.benchmarks.results import terminal_table, to_json
from atspeed.cli.bench.options import Histories, JsonFile, PageFolder, Seed, Threads, save, source_of
from atspeed.cli.options import MAX_EXCLUDED, MAX_REPLICAS, MAX_USERS, MAX_WIDTH, BundleFolder, out
from atspeed.engine.bundle.bundle import Bundle
from atspeed.rpc import event_loop


def bench_load(
    bundle: BundleFolder,
    histories: Histories = None,
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Number of histories.")] = 2000,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.")] = 10,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            min=0.1,
            max=1_000_000,
            help="Requests per second.  [default: shares of the in-process baseline's throughput]",
        ),
    ] = None,
    replicas: Annotated[
        list[int] | None,
        typer.Option(min=1, max=MAX_REPLICAS, help="Target replicas, measured one after the other.  [default: 1 2]"),
    ] = None,
    mix: Annotated[str, typer.Option(help="Shares of users.")] = "new=0.2,returning=0.5,refreshing=0.3",
    seconds: Annotated[float, typer.Option(min=0.1, max=86_400, help="Counted seconds of each rate.")] = 15.0,
    settle: Annotated[
        float, typer.Option(min=0, max=86_400, help="Seconds before these, which are not counted.")
    ] = 5.0,
    unloaded: Annotated[
        int, typer.Option(min=1, max=MAX_USERS, help="Requests one after the other, for the unloaded latency.")
    ] = 60,
    bare: Annotated[
        int, typer.Option(min=1, max=MAX_USERS, help="Searches of each closed loop of the in-process baseline.")
    ] = 120,
    threads: Threads = 1,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Measure latency and goodput of the real services at rising rates, target-only and strict."""
    from atspeed.benchmarks import load

    opened = Bundle(bundle)
    config = load.LoadConfig(
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
    found = event_loop.run(load.run(bundle, chosen, config))
    out.print(terminal_table("Open-loop load", load.TERMINAL_COLUMNS, found.rows))
    about = load.header(found, config, data=source_of(histories))
    save(json_file, opened, seed, to_json(found.rows), about, page=(report, "atspeed.benchmarks.load_report"))


def bench_scaling(
    items: Annotated[
        list[int] | None,
        typer.Option(min=2, max=100_000_000, help="Items of a catalogue.  [default: 10^4 10^5 10^6 10^7]"),
    ] = None,
    codebook: Annotated[int, typer.Option(min=2, max=65_536, help="Codes of each of its four levels.")] = 256,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams.")] = 20,
    excluded: Annotated[int, typer.Option(min=1, max=MAX_EXCLUDED, help="Items that a request excludes.")] = 10_000,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle whose target is searched too.", exists=True, file_okay=False)
    ] = None,
    width: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX_WIDTH, help="Beams of its searches.  [default: 1 5 10 20 50]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Users of each of its measurements.")] = 15,
    threads: Threads = 1,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Measure load time, memory and selection by catalogue size, and searches by beams and prompt length."""
    from atspeed.benchmarks import scaling

    opened = Bundle(bundle) if bundle else None
    config = scaling.CatalogueConfig(items or scaling.SIZES, codebook, k, excluded, seed)
    asked = scaling.SearchConfig(width or scaling.WIDTHS, k, repeats, threads, seed) if opened else None
    catalogues = scaling.measure_catalogues(config)
    searches = event_loop.run(scaling.measure_searches(opened.root, asked)) if opened and asked else []
    for shown in scaling.tables(catalogues, searches):
        out.print(shown)
    rows, about = scaling.rows_to_json(catalogues, searches), scaling.header(config, asked)
    save(json_file, opened, seed, rows, about, page=(report, "atspeed.benchmarks.scaling_report"))
