"""`atspeed recommend`, `record`, `history`, `forget`, `info`: calls of a service."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from atspeed.cli import display
from atspeed.cli.connection import Connection, with_connection
from atspeed.cli.item_lists import Allowed, Excluded, History, Recorded, split
from atspeed.cli.options import AsJson, out, warn
from atspeed.client.arguments import MAX_UINT32, MAX_UINT64
from atspeed.client.recommender import Options, RecommenderClient
from atspeed.engine.search.mode import Mode
from atspeed.rollout.release_track import Track
from atspeed.rpc import event_loop

_Result = TypeVar("_Result")


def _named(user: str | None) -> str | None:
    if user == "":
        raise typer.BadParameter("must not be empty.")
    return user


UserId = Annotated[str, typer.Argument(help="The user.", callback=_named)]
Tenant = Annotated[str, typer.Option(help="Tenant of the user. Tenants share neither histories nor cached states.")]


@with_connection
def recommend(
    user: Annotated[str | None, typer.Argument(help="A user with a stored history.", callback=_named)] = None,
    history: History = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_UINT32, help="Number of items.")] = 10,
    beam_width: Annotated[int, typer.Option(min=0, max=MAX_UINT32, help="Beam width; 0 means max(k, 20).")] = 0,
    mode: Annotated[Mode, typer.Option(help="Verification policy.")] = Mode.STRICT,
    tolerance: Annotated[float, typer.Option(min=0, help="Mode tolerance: largest accepted score gap.")] = 0.0,
    temperature: Annotated[float | None, typer.Option(min=0.01, max=100, help="Sampling modes: temperature.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_UINT64, help="Sampling modes: seed.")] = None,
    exclude: Excluded = None,
    only: Allowed = None,
    exclude_seen: Annotated[bool, typer.Option("--exclude-seen", help="Leave out the items of the history.")] = False,
    items_per_path: Annotated[
        int,
        typer.Option(min=0, max=MAX_UINT32, help="Most items of one code path; 0 means the bundle's limit, if any."),
    ] = 0,
    tenant: Tenant = "",
    track: Annotated[
        Track | None,
        typer.Option(help="Release track to ask, if a canary is served. By default it depends on the user."),
    ] = None,
    as_json: AsJson = False,
    *,
    connection: Connection,
) -> None:
    """Recommend items to a user, or for a history."""
    if (user is None) == (history is None):
        raise typer.BadParameter("give either a user or --history")
    options: Options = {
        "k": k,
        "beam_width": beam_width,
        "mode": mode,
        "tolerance": tolerance,
        "temperature": temperature,
        "seed": seed,
        "history": split(history),
        "excluded": split(exclude),
        "allowed": split(only),
        "exclude_seen": exclude_seen,
        "items_per_path": items_per_path,
        "tenant": tenant,
    }
    reply = _call(connection, lambda client: client.recommend(user, track=track, **options))
    if as_json:
        return _print_json(reply)
    out.print(display.recommendation_table(reply))
    out.print(display.summary(reply), highlight=False, markup=False, soft_wrap=True)
    for warning in display.warnings(reply):
        warn(warning)
    return None


@with_connection
def record(
    user: UserId,
    items: Recorded,
    tenant: Tenant = "",
    as_json: AsJson = False,
    *,
    connection: Connection,
) -> None:
    """Append items to a user's history. Ids that the catalogue does not know are stored too."""
    reply = _call(connection, lambda client: client.record(user, split(items) or [], tenant=tenant))
    if as_json:
        return _print_json(reply)
    out.print(f"{user}: {reply.history_length} items", highlight=False, markup=False, soft_wrap=True)
    if reply.unknown_item_ids:
        warn(f"stored, but not in the catalogue: {display.shortened(reply.unknown_item_ids)}")
    return None


@with_connection
def history(user: UserId, tenant: Tenant = "", *, connection: Connection) -> None:
    """Print a user's stored items, oldest first, one per line."""
    items = _call(connection, lambda client: client.history(user, tenant=tenant))
    for item in items:
        print(item)
    if not items:
        warn(f"nothing is stored for {user}")


@with_connection
def forget(user: UserId, tenant: Tenant = "", *, connection: Connection) -> None:
    """Erase a user's history."""
    existed = _call(connection, lambda client: client.forget(user, tenant=tenant))
    print("forgotten" if existed else "nothing was stored")


@with_connection
def info(*, connection: Connection) -> None:
    """Print versions, limits and the state of the services as JSON."""
    _print_json(_call(connection, lambda client: client.info()))


def _call(connection: Connection, call: Callable[[RecommenderClient], Coroutine[Any, Any, _Result]]) -> _Result:
    async def connected() -> _Result:
        async with connection.client() as client:
            return await call(client)

    return event_loop.run(connected())


def _print_json(message: Message) -> None:
    print(MessageToJson(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
