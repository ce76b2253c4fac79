"""`atspeed bench prefix`: what a cached prefix is worth, tier by tier."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from client.bench_cli import Histories, JsonFile, Seed, Users, chosen_histories, save
from client.cli_parts import BundleFolder, CommandError, out
from engine.bundle import Bundle


def bench_prefix(
    bundle: BundleFolder,
    users: Users = 100,
    histories: Histories = None,
    draft: Annotated[bool, typer.Option("--draft", help="Measure the draft instead of the target.")] = False,
    nodes: Annotated[int, typer.Option(min=0, help="Trie nodes in the pass, besides the root.")] = 120,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a pass.")] = 1,
    block_tokens: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens in one block; an item's without it.")
    ] = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """A request's first pass with its prompt cold, in memory, in Redis, or but for one new item; exits with 1 if they differ."""
    from benchmarks import prefix

    opened = Bundle(bundle)
    if draft and opened.manifest.draft is None:
        raise CommandError("--draft: the bundle has no draft")
    question = prefix.Question("draft" if draft else "target", nodes, threads, block_tokens, seed)
    chosen = [history for history in chosen_histories(opened, histories, users, seed) if len(history) > 1]
    if not chosen:
        raise CommandError("no user has two items or more")
    rows = asyncio.run(prefix.run(opened, chosen, question))
    out.print(prefix.table(rows))
    save(json_file, opened, seed, prefix.to_json(rows), prefix.header(question))
    if wrong := [row.state for row in rows if not row.same]:
        raise CommandError(f"evaluations differ from the cold one's: {', '.join(wrong)}")
