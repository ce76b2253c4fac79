"""`atspeed recommend`, `record`, `history`, `forget`, `info`: calls of a service."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from atspeed.cli import display, explanation
from atspeed.cli.connection import Connection, with_connection
from atspeed.cli.item_lists import Allowed, Excluded, History, Recorded, WhyNot, split
from atspeed.cli.options import AsJson, named_values, out, warn
from atspeed.engine.search.mode import Mode
from atspeed.rollout.release_track import Track
from atspeed_client import Client, Explanation, Recommendation, RecommendRequest
from atspeed_client.arguments import MAX_INT32, MAX_INT64
from atspeed_client.replies import Reply

_Result = TypeVar("_Result")


def _named(user: str | None) -> str | None:
    if user == "":
        raise typer.BadParameter("must not be empty.")
    return user


UserId = Annotated[str, typer.Argument(help="The user.", callback=_named)]
Tenant = Annotated[str, typer.Option(help="Tenant of the user. Tenants share neither histories nor cached states.")]

BeamWidth = Annotated[
    list[int] | None,
    typer.Option(
        min=0,
        max=MAX_INT32,
        help="Beam width. Several: the widths of levels 1, 2, ...; the last one holds for all further levels.  "
        "[default: max(k, 20)]",
    ),
]
ItemsPerPath = Annotated[
    int,
    typer.Option(min=0, max=MAX_INT32, help="Most items of one code path; 0 means the bundle's limit, if any."),
]
Field = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE: a field of the user that the bundle's prompts hold.")
]
TrackOption = Annotated[
    Track | None,
    typer.Option(help="Release track to ask, if a canary is served. By default it depends on the user."),
]
Explain = Annotated[bool, typer.Option("--explain", help="Draw the search and its time too. Needs the scope explain.")]


@with_connection
def recommend(
    user: Annotated[str | None, typer.Argument(help="A user with a stored history.", callback=_named)] = None,
    history: History = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_INT32, help="Number of items.")] = 10,
    beam_width: BeamWidth = None,
    mode: Annotated[Mode, typer.Option(help="Verification policy.")] = Mode.STRICT,
    tolerance: Annotated[float, typer.Option(min=0, help="Mode tolerance: largest accepted score gap.")] = 0.0,
    temperature: Annotated[float | None, typer.Option(min=0.01, max=100, help="Sampling modes: temperature.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_INT64, help="Sampling modes: seed.")] = None,
    exclude: Excluded = None,
    only: Allowed = None,
    exclude_seen: Annotated[bool, typer.Option("--exclude-seen", help="Leave out the items of the history.")] = False,
    items_per_path: ItemsPerPath = 0,
    field: Field = None,
    tenant: Tenant = "",
    track: TrackOption = None,
    explain: Explain = False,
    why_not: WhyNot = None,
    as_json: AsJson = False,
    *,
    connection: Connection,
) -> None:
    """Recommend items to a user, or for a history."""
    if (user is None) == (history is None):
        raise typer.BadParameter("give either a user or --history")
    request = RecommendRequest(
        user,
        history=split(history),
        k=k,
        beam_width=beam_width[0] if beam_width and len(beam_width) == 1 else 0,
        beam_widths=beam_width if beam_width and len(beam_width) > 1 else None,
        mode=mode,
        tolerance=tolerance,
        temperature=temperature,
        seed=seed,
        excluded=split(exclude),
        allowed=split(only),
        exclude_seen=exclude_seen,
        items_per_path=items_per_path,
        user_fields=named_values("--field", field or []),
        tenant=tenant,
    )
    if explain or why_not:
        found = _call(connection, lambda client: client.explain(request, items=split(why_not) or [], track=track))
        if as_json:
            _print_json(found)
        else:
            _print_explanation(found, drawn=explain)
        return
    reply = _call(connection, lambda client: client.send(request, track=track))
    if as_json:
        _print_json(reply)
    else:
        _print_list(reply)


def _print_explanation(found: Explanation, *, drawn: bool) -> None:
    _print_list(found.response)
    if drawn:
        out.print(explanation.token_tree(found))
        out.print(explanation.stage_table(found))
    for item in found.items:
        out.print(explanation.item_lines(item, found), highlight=False, markup=False, soft_wrap=True)


def _print_list(reply: Recommendation) -> None:
    out.print(display.recommendation_table(reply))
    out.print(display.summary(reply), highlight=False, markup=False, soft_wrap=True)
    for warning in display.warnings(reply):
        warn(warning)


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
def history(user: UserId, tenant: Tenant = "", as_json: AsJson = False, *, connection: Connection) -> None:
    """Print a user's stored items, oldest first, one per line."""
    items = _call(connection, lambda client: client.history(user, tenant=tenant))
    if as_json:
        return _print_json(items)
    for item in items.item_ids:
        print(item)
    if not items:
        warn(f"nothing is stored for {user}")
    return None


@with_connection
def forget(user: UserId, tenant: Tenant = "", as_json: AsJson = False, *, connection: Connection) -> None:
    """Erase a user's history."""
    existed = _call(connection, lambda client: client.forget(user, tenant=tenant))
    print(json.dumps({"existed": bool(existed)}) if as_json else "forgotten" if existed else "nothing was stored")


@with_connection
def info(_as_json: AsJson = False, *, connection: Connection) -> None:
    """Print versions, limits and the state of the services as JSON, with or without --json."""
    _print_json(_call(connection, lambda client: client.info()))


def _call(connection: Connection, call: Callable[[Client], _Result]) -> _Result:
    with connection.client() as client:
        return call(client)


def _print_json(reply: Reply) -> None:
    print(json.dumps(reply.to_dict(), indent=2, ensure_ascii=False))
