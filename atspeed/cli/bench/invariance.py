"""`atspeed bench invariance`: nodes of random trees, compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from atspeed.benchmarks import invariance
from atspeed.benchmarks.provenance import provenance
from atspeed.benchmarks.results import Result, terminal_table, to_json
from atspeed.cli.bench.options import JsonFile, Seed
from atspeed.cli.options import MAX_THREADS, CommandError, optional, out
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.model.invariance import TreeSizes

_DEPTH = 4  # nodes of a path below a made model's prompt


class Family(StrEnum):
    """Families of small models."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"


def bench_invariance(
    bundle: Annotated[
        Path | None, typer.Option(help="Directory of a bundle, for its target.", exists=True, file_okay=False)
    ] = None,
    family: Annotated[
        list[Family] | None, typer.Option(help="Made-up small models of these families, in place of a bundle's target.")
    ] = None,
    trees: Annotated[int, typer.Option(min=1, max=1_000_000, help="Random token trees of each model.")] = 1_000,
    part: Annotated[int, typer.Option(min=1, max=1_000_000, help="Trees between two writes of the result file.")] = 100,
    prompt: Annotated[int, typer.Option(min=1, max=65_536, help="Longest prompt, in tokens.")] = 4_096,
    nodes: Annotated[int, typer.Option(min=1, max=65_536, help="Most nodes of a tree.")] = 512,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Most trees of a pass.")] = 16,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX_THREADS, help="Threads of a pass.  [default: 1 2 4]")
    ] = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Compare nodes of random token trees in shared passes and alone, bit for bit; exits with 1 if one differs.

    A result file that holds parts of the same run is continued.
    """
    if (bundle is None) == (not family):
        raise CommandError("give either --bundle or --family")
    opened, numbers = Bundle(bundle) if bundle else None, threads or [1, 2, 4]
    depth = max(1, opened.catalogue().trie.levels - 1) if opened else _DEPTH
    parts = invariance.TreeParts(TreeSizes(prompt, nodes, depth=depth, trees=batch), trees, min(part, trees), seed)
    asked = {"prompt": prompt, "nodes": nodes, "batch": batch, "threads": numbers, "part": parts.part}
    header = provenance(opened, seed=seed) | {"benchmark": invariance.NAME, **asked}
    rows = _rows_so_far(json_file, header, [*asked, "seed", "bundle", "revision", "machine", "versions"])
    for model in _models(opened, family or [], numbers, seed):
        for row in invariance.run(model, parts, rows):
            rows.append(row)
            if json_file is not None:
                Result(header, to_json(rows)).write(json_file)
    totals = invariance.by_model(rows)
    out.print(terminal_table("Nodes in shared passes and alone", invariance.COLUMNS, totals))
    if moved := sum(row.moved + row.prompts_moved for row in totals):
        raise CommandError(f"{moved} nodes or prompts differ by a bit or more")


def _models(
    bundle: Bundle | None, families: Sequence[str], threads: Sequence[int], seed: int
) -> Iterator[invariance.CheckedModel]:
    if bundle is not None:
        yield invariance.CheckedModel.of_bundle(bundle, threads)
        return
    made = optional("atspeed.benchmarks.made_invariance")  # needs torch
    for family in families:
        yield made.made(family, threads, seed)


def _rows_so_far(path: Path | None, header: dict[str, Any], names: Sequence[str]) -> list[invariance.InvarianceRow]:
    """Return the parts in the result file. Raises CommandError if they were made by another run or on another machine."""
    if path is None or not path.exists():
        return []
    written = Result.read(path)
    rows = written.rows_of(invariance.NAME, invariance.InvarianceRow)
    if other := [name for name in names if written.header.get(name) != header[name]]:
        raise CommandError(f"--json: {path} holds parts of another run ({', '.join(other)}); name another file")
    return rows
