"""Replies and bundles as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from atspeed.v1 import recommendation_pb2 as pb
from rich.table import Table
from rich.text import Text

from engine.bundle import Manifest

Describe = Callable[[str], Sequence[str]]


def origin(item: pb.RecommendedItem) -> str:
    """How the search came to an item."""
    return pb.Origin.Name(item.origin).removeprefix("ORIGIN_").lower()


def milliseconds(reply: pb.RecommendResponse) -> float:
    """From the arrival of the request at the service to its reply."""
    return reply.statistics.stage_times.total_ns / 1e6


def recommendation_table(
    reply: pb.RecommendResponse,
    *,
    title: str | None = None,
    described_as: Sequence[str] = (),
    describe: Describe | None = None,
) -> Table:
    """The items of a reply. describe: more columns for an item id, under the headings `described_as`."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("#", justify="right")
    for heading in ("item", *described_as):
        shown.add_column(heading)
    shown.add_column("score", justify="right")
    shown.add_column("codes")
    shown.add_column("origin")
    for item in reply.items:
        # As Text: an id may hold what rich would read as markup.
        more = [Text(value) for value in describe(item.item_id)] if describe else []
        codes = "-".join(map(str, item.code_path))
        shown.add_row(str(item.rank), Text(item.item_id), *more, f"{item.score:.3f}", codes, origin(item))
    return shown


def summary(reply: pb.RecommendResponse) -> str:
    """What it took and what is to be said of it, one fact a line."""
    took, mode = reply.statistics, pb.Mode.Name(reply.mode).removeprefix("MODE_").lower().replace("_", "-")
    lines = [
        f"{mode}, {'exact' if reply.exactness.exact else 'not exact'}: {took.target_passes} target passes, "
        f"{took.accepted_levels} levels accepted, {milliseconds(reply):.1f} ms",
    ]
    if reply.HasField("seed"):
        lines.append(f"seed: {reply.seed}")
    if reply.exactness.largest_slack:
        lines.append(f"largest slack used: {reply.exactness.largest_slack:.4f}")
    lines += [f"degraded: {reason}" for reason in reply.degraded_reasons]
    if reply.unknown_history_item_ids:
        lines.append(f"not in the catalogue: {', '.join(reply.unknown_history_item_ids)}")
    if reply.fewer_than_k_reason:
        lines.append(reply.fewer_than_k_reason)
    return "\n".join(lines)


def manifest_table(manifest: Manifest, items: int, paths: int) -> Table:
    """What a bundle holds."""
    shown = Table(title=f"{manifest.name}  {manifest.version}", title_justify="left", show_header=False)
    shown.add_column(style="bold")
    shown.add_column()
    rows = {
        "scoring rule": str(manifest.scoring_rule),
        "catalogue": f"{items} items under {paths} code paths, version {manifest.catalogue_version}",
        "empty history": "allowed" if manifest.allow_empty_history else "refused",
    }
    for role, model in manifest.models.items():
        rows[role] = (
            f"{model.architecture}, {model.parameters:,} parameters, {model.precision}, {model.layers} layers, "
            f"vocabulary {model.vocab_size}, at most {model.max_positions} tokens"
        )
    source = manifest.provenance
    rows |= {"recipe": source.recipe, "data": source.data, "terms": source.terms}
    rows["created"] = source.created_at.isoformat(timespec="seconds")
    rows |= {name: f"{value:.4f}" for name, value in source.metrics.items()}
    for name, value in rows.items():
        if value:
            shown.add_row(name, Text(value))
    return shown
