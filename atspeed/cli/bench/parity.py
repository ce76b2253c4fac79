"""`atspeed bench parity`: lists of the target beside those of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atspeed.benchmarks.histories import History, choose_histories, served_parts, user_fields
from atspeed.benchmarks.results import terminal_table, to_json
from atspeed.cli.bench.options import (
    Histories,
    JsonFile,
    Seed,
    Users,
    print_identity,
    save,
)
from atspeed.cli.import_checkpoint import Adapter, Base, ItemFile, ItemText, MaxItems, Separator, layout_changes
from atspeed.cli.options import MAX_WIDTH, BundleFolder, CommandError, optional, out, warn
from atspeed.engine.bundle.bundle import Bundle
from atspeed.rpc import event_loop

if TYPE_CHECKING:
    from atspeed.benchmarks.parity import ParityRow


Checkpoint = Annotated[
    Path,
    typer.Option(help="The Hugging Face checkpoint that the target was exported from.", exists=True, file_okay=False),
]
Prompt = Annotated[
    str | None,
    typer.Option(help="Your own prompt, which generate then reads: a layout's name, or a file of `atspeed import`."),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(help="Folder of its tokenizer; by default the checkpoint.", exists=True, file_okay=False),
]
Index = Annotated[
    Path | None,
    typer.Option(help="Index of the items, to compare the bundle's code tokens with.", exists=True, dir_okay=False),
]
Counts = Annotated[
    bool, typer.Option(help="Count the lists that bfloat16 changes, and the illegal items of sets per level.")
]
K = Annotated[
    list[int] | None, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 1 5 10 20]")
]


def bench_parity(
    bundle: BundleFolder,
    checkpoint: Checkpoint,
    prompt: Prompt = None,
    tokenizer: Tokenizer = None,
    index: Index = None,
    items: ItemFile = None,
    separator: Separator = None,
    item: ItemText = None,
    max_items: MaxItems = None,
    adapter: Adapter = None,
    base: Base = None,
    counts: Counts = True,
    k: K = None,
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
