"""`atspeed bench gpu`, `gpu-lists`: what a GPU does in minutes, and in an hour."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from atspeed.benchmarks import decode_rows
from atspeed.benchmarks.histories import choose_histories
from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import Result
from atspeed.cli.bench.options import Histories, Seed, save, source_of
from atspeed.cli.bench.speed import RunsOn, Threads, Widths
from atspeed.cli.options import MAX_USERS, MAX_WIDTH, CommandError, optional, out
from atspeed.engine.bundle.bundle import Bundle
from atspeed.rpc import event_loop

_MAX_POOL_MB = 2**20  # a TiB, more than any device has

Format = Literal["float32", "float16", "bfloat16"]
TrainedBundle = Annotated[
    Path,
    typer.Option(
        "--bundle", help="A bundle that `atspeed train` wrote, next to its checkpoints.", exists=True, file_okay=False
    ),
]


def bench_gpu(
    minutes: Annotated[float, typer.Option(min=0, help="Time after which nothing new begins.")] = 4.0,
    size: Annotated[
        list[str] | None, typer.Option(metavar="SHAPE", help="Shapes of `atspeed inflate`.  [default: 1.7b 7b]")
    ] = None,
    precision: Annotated[Format, typer.Option(help="Precision of the large models' weights.")] = "float16",
    provider: RunsOn = "cuda",
    repeats: Annotated[int, typer.Option(min=1, max=1_000_000, help="Most repetitions of a measurement.")] = 20,
    pool_mb: Annotated[
        int, typer.Option(min=1, max=_MAX_POOL_MB, help="Memory for keys and values on the device, in MiB.")
    ] = 8192,
    threads: Threads = None,
    seed: Seed = 1,
    json_file: Annotated[
        Path, typer.Option("--json", help="Write the result here, again after every row.", dir_okay=False)
    ] = Path("gpu.json"),
) -> None:
    """Check and measure passes on a GPU that is there for minutes; a run that is cut leaves a result.

    Weights are made in memory. Exits with 1 if a graph is not right on the device.
    """
    gpu, settings = optional("atspeed.benchmarks.gpu"), optional("atspeed.benchmarks.gpu_config")
    config = settings.GpuConfig(
        provider=provider,
        minutes=minutes,
        sizes=size or settings.SIZES,
        precision=precision,
        threads=threads or os.cpu_count() or 1,
        repeats=repeats,
        pool_mb=pool_mb,
        seed=seed,
    )
    gpu.check(config)
    about = provenance(None, seed=seed) | gpu.header(config)
    rows = []
    for row in gpu.measure(config):
        rows.append(row)
        Result(about, rows).write(json_file)
        out.print(json.dumps(row), highlight=False, soft_wrap=True)
    if wrong := gpu.wrong(rows):
        raise CommandError(f"not right on {provider}: {'; '.join(wrong)}")


def bench_gpu_lists(
    bundle: TrainedBundle,
    work: Annotated[Path, typer.Option(help="Folder in which inflated bundles are kept; 40 GB.", file_okay=False)],
    histories: Histories = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="TARGET+DRAFT", help="Shapes of `atspeed inflate`.  [default: 1.7b+68m 7b+68m]"),
    ] = None,
    precision: Annotated[
        Literal["float32", "float16"], typer.Option(help="Precision of inflated weights.")
    ] = "float16",
    provider: RunsOn = "cuda",
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Users whose lists are timed.")] = 30,
    exact_users: Annotated[
        int, typer.Option(min=1, max=MAX_USERS, help="Users whose lists are compared with those of the CPU.")
    ] = 100,
    hf_users: Annotated[int, typer.Option(min=0, max=MAX_USERS, help="Users whose lists Hugging Face makes too.")] = 5,
    k: Widths = None,
    beams: Annotated[int, typer.Option(min=1, max=MAX_WIDTH, help="Beams of the search behind a long prompt.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Tokens of that prompt.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, max=1_000_000, help="Repetitions of each single pass.")] = 20,
    threads: Threads = None,
    seed: Seed = 1,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for gpu-lists-DATE.json.", file_okay=False)] = Path(
        "docs/benchmarks"
    ),
) -> None:
    """Measure lists on a GPU, with a trained draft and at the size of large models. It takes an hour; `gpu` takes minutes."""
    gpu = optional("atspeed.benchmarks.gpu_lists")
    optional("transformers.utils.logging").disable_progress_bar()
    opened = Bundle(bundle)
    config = gpu.GpuConfig(
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
    gpu.check(config)
    chosen = choose_histories(opened.catalogue(), histories, max(users + 1, exact_users), seed, least_items=2)
    found = event_loop.run(gpu.run(opened, chosen, config))
    for one in found.sizes:
        out.print(f"{one.size}, inflated", highlight=False)
        out.print(decode_rows.table(one.lists))
    about = gpu.header(config, histories=source_of(histories))
    save(out_folder / gpu.file_name(), opened, seed, gpu.rows_to_json(found), about)
    if found.different:
        raise CommandError(f"{found.different} lists on {provider} differ from the CPU's beyond near-ties")
