"""Result files: `header` says where the `rows` come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atspeed.benchmarks.errors import BenchmarkError
from atspeed.engine.files.json_file import with_nulls, write_json


@dataclass(frozen=True)
class Result:
    """What a benchmark found, as JSON values."""

    header: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def write(self, path: Path) -> None:
        """Write the file, and its folder where there is none. What is no number becomes null, so that the rest is kept."""
        write_json(path, with_nulls({"header": self.header, "rows": self.rows}))

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what `write` wrote. Raises BenchmarkError naming the file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(dict(content["header"]), [dict(row) for row in content["rows"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"{path}: not a result file: {error!r}") from error
