"""`atspeed bench lossless`: lists of strict mode beside those of target-only."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from atspeed.benchmarks import lossless
from atspeed.benchmarks.histories import choose_histories
from atspeed.benchmarks.results import terminal_table, to_json
from atspeed.cli.bench.options import Histories, JsonFile, Seed, Users, print_identity, save
from atspeed.cli.options import MAX_EXCLUDED, MAX_WIDTH, BundleFolder, CommandError, out
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.search.scoring import ScoringRule
from atspeed.rpc import event_loop

RuleChoice = Literal["bundle", "vocab", "trie", "codes", "all"]


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


def _rules(bundle: Bundle, choice: RuleChoice) -> list[ScoringRule]:
    if choice == "all":
        return list(ScoringRule)
    return [bundle.manifest.scoring_rule if choice == "bundle" else ScoringRule(choice)]
