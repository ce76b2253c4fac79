"""Counts of target passes that are kept beside each draft, so that a study resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.files.json_file import write_json
from research import acceptance
from research.acceptance import AcceptanceConfig, AcceptanceRow
from research.eval_examples import HeldOutCase


def count(
    bundles: Mapping[str, Bundle], cases: Sequence[HeldOutCase], config: AcceptanceConfig, *, study: str
) -> list[AcceptanceRow]:
    """Count target passes for each draft, or read what an earlier run of the study has counted for the same users.

    Every draft is compared with the target alone, whose rows are the same each time and are returned once.
    """
    rows: dict[tuple[str, str, int, str], AcceptanceRow] = {}
    for name, bundle in bundles.items():
        kept, key = bundle.root.parent / f"{study}-counts.json", _key(name, bundle, cases, config)
        found = _read(kept, key)
        if found is None:
            found = acceptance.run(bundle, {name: bundle}, cases, config)
            write_json(kept, {"key": key, "rows": acceptance.rows_to_json(found)})
        rows |= {(row.draft, row.mode, row.k, row.budget): row for row in found}
    return list(rows.values())


def _key(name: str, bundle: Bundle, cases: Sequence[HeldOutCase], config: AcceptanceConfig) -> list[object]:
    """Return all that the counts depend on, as JSON values. Processes and threads change none."""
    users = [[list(case.history), list(case.answers), case.seed] for case in cases]
    budgets, modes = [budget.label for budget in config.budgets], [str(mode) for mode in config.modes]
    return [name, bundle.manifest.version, users, budgets, list(config.widths), modes, config.tolerance, config.seed]


def _read(kept: Path, key: object) -> list[AcceptanceRow] | None:
    """Return the rows that were kept under this key, or None."""
    try:
        content = json.loads(kept.read_bytes())
        return TypeAdapter(list[AcceptanceRow]).validate_python(content["rows"]) if content["key"] == key else None
    except (OSError, ValueError, LookupError, TypeError, ValidationError):
        return None
