"""`atspeed bench lossless`, `invariance`: promises of lists and scores, checked."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from atspeed.benchmarks.histories import choose_histories
from atspeed.benchmarks.results import terminal_table, to_json
from atspeed.cli.bench.options import (
    Histories,
    JsonFile,
    Seed,
    Users,
    print_identity,
    save,
)
from atspeed.cli.options import MAX_EXCLUDED, MAX_THREADS, MAX_WIDTH, BundleFolder, CommandError, out
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.search.scoring import ScoringRule
from atspeed.rpc import event_loop

RuleChoice = Literal["bundle", "vocab", "trie", "codes", "all"]


def bench_lossless(
    bundle: BundleFolder,
    users: Users = 500,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Items of a list.")] = 20,
    excluded: Annotated[int, typer.Option(min=0, max=MAX_EXCLUDED, help="Items excluded per user.")] = 50,
    rule: Annotated[RuleChoice, typer.Option(help="Scoring rules; another than the bundle's on a copy.")] = "bundle",
    histories: Histories = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Compare strict with target-only under exclusions; exits with 1 if a list differs or a path is invalid."""
    from atspeed.benchmarks import lossless

    opened = Bundle(bundle)
    chosen = choose_histories(opened.catalogue(), histories, users, seed)
    config = lossless.LosslessConfig(k=k, excluded=excluded, seed=seed)
    rows = event_loop.run(lossless.run(bundle, chosen, config, _rules(opened, rule)))
    title = f"Strict and target-only: K = {k}, {excluded} excluded items, {len(chosen)} users"
    out.print(terminal_table(title, lossless.COLUMNS, rows))
    print_identity(lossless.REFERENCE, rows)
    save(json_file, opened, seed, to_json(rows))
    ties_fail = opened.manifest.target.plan_invariant  # its scores are promised bit for bit
    if failures := sum(row.different + row.invalid_paths + row.near_ties * ties_fail for row in rows):
        beyond = "" if ties_fail else " beyond near-ties"
        raise CommandError(f"{failures} lists differ{beyond} or paths are invalid")


def bench_invariance(
    bundle: BundleFolder,
    trees: Annotated[int, typer.Option(min=1, max=1_000_000, help="Random token trees.")] = 1_000,
    prompt: Annotated[int, typer.Option(min=1, max=65_536, help="Longest prompt, in tokens.")] = 4_096,
    nodes: Annotated[int, typer.Option(min=1, max=65_536, help="Most nodes of a tree.")] = 512,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Most trees of a pass.")] = 16,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX_THREADS, help="Threads of a pass.  [default: 1 2 4]")
    ] = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Compare nodes of random token trees in company and alone, bit for bit; exits with 1 if one differs."""
    from atspeed.benchmarks import invariance
    from atspeed.engine.model.invariance import TreeSizes

    opened, levels = Bundle(bundle), Bundle(bundle).catalogue().trie.levels
    sizes = TreeSizes(prompt, nodes, depth=max(1, levels - 1), trees=batch)
    row = invariance.run(opened, sizes, trees=trees, threads=threads or [1, 2, 4], seed=seed)
    out.print(terminal_table("Nodes in company and alone", invariance.COLUMNS, [row]))
    save(json_file, opened, seed, to_json([row]))
    if moved := row.moved + row.prompts_moved:
        raise CommandError(f"{moved} nodes or prompts differ by a bit or more")


def _rules(bundle: Bundle, choice: RuleChoice) -> list[ScoringRule]:
    if choice == "all":
        return list(ScoringRule)
    return [bundle.manifest.scoring_rule if choice == "bundle" else ScoringRule(choice)]
