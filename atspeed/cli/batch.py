"""`atspeed batch`: the lists of all users of a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from atspeed.batch.lists import ListFolder, ListFormat
from atspeed.batch.run import Batch, ListUsers, Shard
from atspeed.batch.run import Progress as BatchProgress
from atspeed.batch.served_lists import served_lists
from atspeed.cli.connection import Connection, with_connection
from atspeed.cli.interrupts import interruptible
from atspeed.cli.options import MAX_THREADS, MAX_WIDTH, AsJson, err, print_result
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.training.errors import Paused
from atspeed_client.calls import MAX_RETRIES

_MAX_CHUNK_USERS = 1_000_000
_MAX_CONCURRENCY = 1_024


@with_connection
def batch(
    users: Annotated[
        Path,
        typer.Argument(
            help="Users and histories: .jsonl with user_id and history per line, or .parquet with these columns.",
            exists=True,
            dir_okay=False,
        ),
    ],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for the lists; a run in it is resumed.", file_okay=False)
    ],
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Bundle to run in this process; without it, the service at --address.", exists=True, file_okay=False
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Number of items.")] = 10,
    beam_width: Annotated[int, typer.Option(min=0, max=MAX_WIDTH, help="Beam width; 0 means max(k, 20).")] = 0,
    mode: Annotated[
        Literal["strict", "target-only"], typer.Option(help="Speculation or plain beam search; the lists are the same.")
    ] = "strict",
    exclude_seen: Annotated[bool, typer.Option("--exclude-seen", help="Leave out the items of the history.")] = False,
    shard: Annotated[str, typer.Option(help="Part of the users, I/N: for N processes or machines.")] = "1/1",
    form: Annotated[ListFormat, typer.Option("--format", help="Format of the lists.")] = "parquet",
    chunk_users: Annotated[
        int,
        typer.Option(
            min=1, max=_MAX_CHUNK_USERS, help="Users of one file of lists. An interruption loses at most one."
        ),
    ] = 1_000,
    concurrency: Annotated[
        int, typer.Option(min=1, max=_MAX_CONCURRENCY, help="Lists at once; they share passes.")
    ] = 16,
    threads: Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="CPU threads of one pass, with --bundle.")] = 2,
    as_json: AsJson = False,
    *,
    connection: Connection,
) -> None:
    """Write the lists of all users of a file, by a bundle in this process or by a service at batch priority.

    A file of lists is complete or absent. After an interruption, exit code 75, the same command continues with what is missing.
    A user without a list has a row with an error.
    """
    work = Batch(users, ListFolder(folder, form), chunk_users, _shard(shard))
    options: dict[str, Any] = {"k": k, "beam_width": beam_width, "mode": mode, "exclude_seen": exclude_seen}
    served_by = {"bundle": read_manifest(bundle).version} if bundle else {"address": connection.address}
    total = work.begin({**options, **served_by, "format": form})
    try:
        with interruptible(), _lists(bundle, connection, options, threads, concurrency) as list_users, _bar() as bar:
            task = bar.add_task("users", total=total)
            done = work.run(list_users, lambda progress: bar.update(task, completed=progress.users))
    except KeyboardInterrupt:
        raise Paused(f"{folder} holds the lists that are done") from None
    counts = {"users": done.users, "failed": done.failed, "skipped": done.skipped}
    print_result(_summary(folder, done), {"folder": folder} | counts, as_json=as_json)


def _shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--shard'") from None


@contextmanager
def _lists(
    bundle: Path | None, connection: Connection, options: dict[str, Any], threads: int, concurrency: int
) -> Iterator[ListUsers]:
    if bundle:
        from atspeed.batch.local_lists import local_lists
        from atspeed.local.recommender import Recommender, RecommenderOptions

        with Recommender(bundle, RecommenderOptions(threads=threads)) as recommender:
            yield local_lists(recommender, options, concurrency=concurrency)
    else:
        with connection.client(retries=MAX_RETRIES) as client:
            yield served_lists(client, options, concurrency=concurrency)


def _summary(folder: Path, done: BatchProgress) -> str:
    return f"{folder}: {done.users} users, {done.failed} new ones without a list, {done.skipped} were there already"


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err)
