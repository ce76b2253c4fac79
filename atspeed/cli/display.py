"""Formats replies and bundles as tables and lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from atspeed_client import Recommendation

if TYPE_CHECKING:
    from atspeed.engine.bundle.manifest import Manifest


def milliseconds(reply: Recommendation) -> float:
    """Return the time from the request's arrival at the service to its reply."""
    return reply.statistics.stage_times.total_ms


def recommendation_table(reply: Recommendation) -> Table:
    """Format the items of a reply."""
    shown = Table()
    for name in ("#", "item", "score", "codes", "origin"):
        # Folded: an id that is cut could not be named in a request.
        shown.add_column(name, justify="right" if name in {"#", "score"} else "left", overflow="fold")
    for item in reply.items:
        codes = "-".join(map(str, item.code_path))
        # Text, since rich would read brackets in an id as markup.
        shown.add_row(str(item.rank), Text(item.item_id), f"{item.score:.3f}", codes, item.origin)
    return shown


def summary(reply: Recommendation) -> str:
    """Summarise a reply, one fact per line."""
    took = reply.statistics
    lines = [
        f"{reply.mode}, {'exact' if reply.exactness.exact else 'not exact'}: {took.target_passes} target passes, "
        f"{took.accepted_levels} levels accepted, {milliseconds(reply):.1f} ms",
    ]
    if reply.seed is not None:
        lines.append(f"seed: {reply.seed}")
    if reply.exactness.largest_slack:
        lines.append(f"largest slack used: {reply.exactness.largest_slack:.4f}")
    lines += [f"degraded: {description}" for description in reply.degraded_descriptions]
    if reply.fewer_than_k_description:
        lines.append(reply.fewer_than_k_description)
    return "\n".join(lines)


_SHOWN_IDS = 10  # keeps a warning on about one line


def warnings(reply: Recommendation) -> list[str]:
    """Return reasons for which a list may be unexpected."""
    found = []
    if reply.cold_start:
        found.append(f"{reply.cold_start_description}: this list is the same for every user without a history")
    if reply.unknown_history_item_ids:
        found.append(f"not in the catalogue: {shortened(reply.unknown_history_item_ids)}")
    for count, what in ((reply.unknown_excluded_items, "excluded"), (reply.unknown_allowed_items, "allowed")):
        if count:
            found.append(f"{count} of the {what} ids not in the catalogue")
    return found


def shortened(ids: Sequence[str]) -> str:
    """Join the first ids of many."""
    more = len(ids) - _SHOWN_IDS
    return ", ".join(ids[:_SHOWN_IDS]) + (f" and {more} more" if more > 0 else "")


def _quantiser(manifest: Manifest) -> str:
    if (entry := manifest.quantiser) is None:
        return "none: new items need given codes"
    if (encoder := entry.encoder) is None:
        return "embeddings of new items are given"
    form = f", texts written as {encoder.text_form!r}" if encoder.text_form else ""
    return f"{encoder.name} {encoder.version}{form}"


def manifest_table(manifest: Manifest, items: int, paths: int) -> Table:
    """Format the content of a bundle."""
    shown = Table(title=f"{manifest.name}  {manifest.version}", title_justify="left", show_header=False)
    shown.add_column(style="bold")
    shown.add_column()
    rows = {
        "scoring rule": str(manifest.scoring_rule),
        "catalogue": f"{items} items under {paths} code paths, version {manifest.catalogue_version}",
        "empty history": "allowed" if manifest.allow_empty_history else "refused",
        "items per path": f"at most {manifest.items_per_path} in a list" if manifest.items_per_path else "",
    }
    for role, model in manifest.models.items():
        rows[role] = (
            f"{model.architecture}, {model.parameters:,} parameters, {model.precision}, {model.layers} layers, "
            f"vocabulary {model.vocab_size}, at most {model.max_positions} tokens"
        )
        if model.heads:
            rows[role] += f", {len(model.heads)} heads of levels"
        if model.inflated_from is not None:
            rows[role] += f"; inflated from {model.inflated_from:,} parameters, for benchmarks of cost"
    rows["quantiser"] = _quantiser(manifest)
    source = manifest.provenance
    rows |= {f"imported {name.replace('_', ' ')}": fact for name, fact in source.imported.items() if name != "prompt"}
    rows |= {"recipe": source.recipe, "data": source.data, "terms": source.terms}
    rows["created"] = source.created_at.isoformat(timespec="seconds")
    rows |= {name: f"{value:.4f}" for name, value in source.metrics.items()}
    for name, value in rows.items():
        if value:
            shown.add_row(name, Text(value))
    return shown
