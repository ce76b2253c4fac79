"""`atspeed bench`: measurements and checks of a served system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from atspeed.benchmarks import lossless
from atspeed.benchmarks.histories import History, choose_histories, served_parts, user_fields
from atspeed.benchmarks.results import terminal_table, to_json
from atspeed.cli.bench.gpu import bench_gpu, bench_gpu_lists
from atspeed.cli.bench.invariance import bench_invariance
from atspeed.cli.bench.load import bench_load, bench_scaling
from atspeed.cli.bench.options import (
    Histories,
    JsonFile,
    OutFolder,
    ResultFile,
    Seed,
    Users,
    print_identity,
    save,
    write_report,
)
from atspeed.cli.bench.speed import bench_batch, bench_decode, bench_events, bench_http, bench_overhead, bench_prefix
from atspeed.cli.errors import Commands
from atspeed.cli.import_checkpoint import Adapter, Base, ItemFile, ItemText, MaxItems, Separator, layout_changes
from atspeed.cli.options import MAX_EXCLUDED, MAX_WIDTH, BundleFolder, CommandError, optional, out, warn
from atspeed.engine.bundle.manifest import Bundle
from atspeed.engine.search.scoring import ScoringRule
from atspeed.rpc import event_loop

if TYPE_CHECKING:
    from atspeed.benchmarks.parity import ParityRow

_PAGES = {
    "decode": "atspeed.benchmarks.decode_report",
    "http": "atspeed.benchmarks.http_calls",
    "load": "atspeed.benchmarks.load_report",
    "overhead": "atspeed.benchmarks.overhead",
    "prefix": "atspeed.benchmarks.prefix",
    "scaling": "atspeed.benchmarks.scaling_report",
}
"""The module that writes a result's page, by the `benchmark` of its header."""

bench_commands = Commands(help="Measure and check.")


@bench_commands.command("parity")
def bench_parity(
    bundle: BundleFolder,
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="The Hugging Face checkpoint that the target was exported from.", exists=True, file_okay=False
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Your own prompt, which generate then reads: a layout's name, or a file of `atspeed import`."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of its tokenizer; by default the checkpoint.", exists=True, file_okay=False),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(help="Index of the items, to compare the bundle's code tokens with.", exists=True, dir_okay=False),
    ] = None,
    items: ItemFile = None,
    separator: Separator = None,
    item: ItemText = None,
    max_items: MaxItems = None,
    adapter: Adapter = None,
    base: Base = None,
    counts: Annotated[
        bool, typer.Option(help="Count the lists that bfloat16 changes, and the illegal items of sets per level.")
    ] = True,
    k: Annotated[
        list[int] | None, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 1 5 10 20]")
    ] = None,
    users: Users = 200,
    histories: Histories = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Compare lists with Hugging Face generate; exits with 1 if one differs beyond near-ties.

    Without --prompt, generate reads the prompts of the bundle, so a wrong prompt is not found.
    """
    changes = layout_changes(separator=separator, item=item, max_items=max_items)
    if prompt is None and (tokenizer or index or items or changes):
        raise typer.BadParameter("--tokenizer, --index, --items, --separator, --item and --max-items need --prompt")
    parity, source_of = optional("atspeed.benchmarks.parity"), optional("atspeed.importing.checkpoint").Source
    reference = optional("atspeed.benchmarks.generate_reference").REFERENCE
    optional("transformers.utils.logging").disable_progress_bar()  # loading takes a moment only
    opened, source = Bundle(bundle), source_of(checkpoint, adapter=adapter, base=base)
    source.config()
    render, known = None, frozenset[str]()
    if prompt is not None:
        of_tokenizer = source_of(tokenizer) if tokenizer else source
        render, known = _authors_render(opened, prompt, of_tokenizer, index, items, changes)
    chosen = _chosen(opened, histories, users, seed, known)
    model = source.load(opened.manifest.target.vocab_size)
    rows = event_loop.run(parity.run(bundle, model, chosen, k or parity.WIDTHS, render=render, counts=counts))
    out.print(terminal_table(f"Comparison with {reference}, {len(chosen)} users", parity.COLUMNS, rows))
    print_identity(reference, rows)
    save(json_file, opened, seed, to_json(rows))
    _check_identical(reference, rows, len(chosen))


def _check_identical(reference: str, rows: Sequence[ParityRow], users: int) -> None:
    """Raise CommandError if a list differs beyond near-ties."""
    if different := sum(row.different for row in rows):
        other = rows[0].prompts_different
        why = f"; {other} of {users} prompts are not the bundle's" if other else ""
        raise CommandError(f"{different} lists differ from {reference} beyond near-ties{why}")


def _chosen(bundle: Bundle, histories: Path | None, users: int, seed: int, known: frozenset[str]) -> list[History]:
    """Return histories without items that the bundle does not serve. Warns if there were any. known: items of the index."""
    catalogue = bundle.catalogue()
    chosen = choose_histories(catalogue, histories, users, seed, unserved=known)
    served = served_parts(chosen, catalogue)
    if cut := len(set(chosen) - set(served)):
        warn(f"{cut} of {len(chosen)} histories hold items that are not served; both sides read the others only")
    if not served:
        raise CommandError(f"{histories}: no history has an item that is served")
    return served


def _authors_render(
    bundle: Bundle, prompt: str, tokenizer: Any, index: Path | None, items: Path | None, changes: dict[str, Any]
) -> tuple[Callable[..., list[int]], frozenset[str]]:
    """Return the function that renders a history as its authors do, and the items of the index.

    Warns of a tail that is not the bundle's.
    """
    authors = optional("atspeed.importing.authors_prompt")
    files = authors.AuthorsFiles(prompt, tokenizer, index, items, changes)
    written = authors.authors_prompt(bundle, files, partial(user_fields, bundle.manifest.target.prompt))
    if written.tail != written.bundle_tail:
        tails = (" ".join(map(repr, tail)) or "nothing" for tail in (written.tail, written.bundle_tail))
        warn(f"the prompt's layout scores {' behind the codes, the bundle '.join(tails)}")
    return written.tokens, written.items


RuleChoice = Literal["bundle", "vocab", "trie", "codes", "all"]


@bench_commands.command("lossless")
def bench_lossless(
    bundle: BundleFolder,
    users: Users = 500,
    k: Annotated[
        list[int] | None, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Items of a list.  [default: 20]")
    ] = None,
    excluded: Annotated[int, typer.Option(min=0, max=MAX_EXCLUDED, help="Items excluded per user.")] = 50,
    prefix: Annotated[
        list[lossless.Prefix] | None,
        typer.Option(help="Where the prefix of strict lists comes from; cold: nowhere.  [default: memory]"),
    ] = None,
    rule: Annotated[RuleChoice, typer.Option(help="Scoring rules; another than the bundle's on a copy.")] = "bundle",
    histories: Histories = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Compare strict with target-only under exclusions; exits with 1 if a list differs or a path is invalid."""

    opened = Bundle(bundle)
    chosen = choose_histories(opened.catalogue(), histories, users, seed)
    config = lossless.LosslessConfig(k or [20], prefix or [lossless.Prefix.MEMORY], excluded=excluded, seed=seed)
    rows: list[lossless.LosslessRow] = []

    async def compare() -> None:
        async for row in lossless.run(bundle, chosen, config, _rules(opened, rule)):
            rows.append(row)
            save(json_file, opened, seed, to_json(rows))  # after every row: the whole takes long

    event_loop.run(compare())
    title = f"Strict and target-only: {excluded} excluded items, {len(chosen)} users"
    out.print(terminal_table(title, lossless.COLUMNS, rows))
    print_identity(lossless.REFERENCE, rows)
    ties_fail = opened.manifest.target.plan_invariant  # its scores are promised bit for bit
    if failures := sum(row.different + row.invalid_paths + row.near_ties * ties_fail for row in rows):
        beyond = "" if ties_fail else " beyond near-ties"
        raise CommandError(f"{failures} lists differ{beyond} or paths are invalid")


bench_commands.command("invariance")(bench_invariance)
bench_commands.command("decode")(bench_decode)
bench_commands.command("overhead")(bench_overhead)
bench_commands.command("http")(bench_http)
bench_commands.command("prefix")(bench_prefix)
bench_commands.command("events")(bench_events)
bench_commands.command("batch")(bench_batch)
bench_commands.command("load")(bench_load)
bench_commands.command("scaling")(bench_scaling)
bench_commands.command("gpu")(bench_gpu)
bench_commands.command("gpu-lists")(bench_gpu_lists)


@bench_commands.command("report")
def bench_report(
    result: ResultFile,
    folder: OutFolder,
) -> None:
    """Write the page of a measurement from its result file."""
    write_report(result, folder, _PAGES)


def _rules(bundle: Bundle, choice: RuleChoice) -> list[ScoringRule]:
    if choice == "all":
        return list(ScoringRule)
    return [bundle.manifest.scoring_rule if choice == "bundle" else ScoringRule(choice)]
