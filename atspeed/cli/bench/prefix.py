"""`atspeed bench prefix`: what a cached prefix is worth, tier by tier."""

from __future__ import annotations

from typing import Annotated

import typer

from atspeed.cli.bench.options import Histories, JsonFile, LeastItems, MostItems, Page, Seed, Users, save, written
from atspeed.cli.options import MAX_THREADS, BundleFolder, CommandError, optional, out
from atspeed.engine.bundle.manifest import Bundle
from atspeed.rpc import event_loop


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
            help="Trie nodes in a pass, besides the root; several are measured one by one.  [default: 0 120]",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="Threads of a pass.")] = 1,
    block_tokens: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="Prompt tokens in one block; an item's without it.")
    ] = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: Page = None,
) -> None:
    """A request's first pass with its prompt cold, in memory, in Redis, or but for one new item; exits with 1 if they differ."""
    from atspeed.benchmarks import prefix
    from atspeed.benchmarks.histories import choose_histories

    page = optional("atspeed.benchmarks.prefix_report") if report else None  # what is missing is said before the work
    opened = Bundle(bundle)
    if draft and opened.manifest.draft is None:
        raise CommandError("--draft: the bundle has no draft")
    question = prefix.Question("draft" if draft else "target", tuple(nodes or (0, 120)), threads, block_tokens, seed)
    catalogue = opened.catalogue()
    chosen = choose_histories(catalogue, histories, users, seed, least_items=least_items, most_items=most_items)
    rows = event_loop.run(prefix.run(opened, chosen, question))
    out.print(prefix.table(rows))
    named = histories.name if histories else "random items"
    about = prefix.header(question, items=(least_items, most_items), histories=named)
    result = save(json_file, opened, seed, prefix.to_json(rows), about)
    if page and report:
        written(page.write(result, report))
    if wrong := [row.state for row in rows if not row.same]:
        raise CommandError(f"evaluations differ from the cold one's: {', '.join(wrong)}")
