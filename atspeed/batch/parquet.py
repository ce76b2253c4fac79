"""Parquet files, by pyarrow: the only module of a batch that needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from atspeed.batch.errors import BatchError

_ROWS_AT_ONCE = 4_096


def pyarrow() -> Any:
    """Return pyarrow with its module `parquet`. Raises BatchError naming the extra when it is not installed."""
    try:
        import pyarrow as module
        import pyarrow.parquet
    except ImportError:
        raise BatchError(
            "pyarrow is not installed, and reads and writes .parquet: pip install 'atspeed-serving[parquet]'"
        ) from None
    return module


def read_rows(path: Path, *, required: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a file's rows, with these columns only. Raises BatchError naming the file."""
    arrow = pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            present = set(file.schema_arrow.names)
            if missing := [name for name in required if name not in present]:
                raise BatchError(f"{path}: has no column {missing[0]}")
            columns = [*required, *(name for name in optional if name in present)]
            for rows in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                yield from rows.to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise BatchError(f"{path}: is no Parquet file that can be read: {error}") from None


def write_rows(file: BinaryIO, rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]]) -> None:
    """Write rows with columns of these (name, Arrow type)s, such as ("scores", "list<double>")."""
    arrow = pyarrow()
    arrow.parquet.write_table(arrow.Table.from_pylist(list(rows), schema=_schema(columns)), file)


def count_rows(path: Path) -> int:
    """Return the number of a file's rows. Raises BatchError naming the file."""
    arrow = pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    except (OSError, arrow.ArrowException) as error:
        raise BatchError(f"{path}: is no Parquet file that can be read: {error}") from None


def _schema(columns: Sequence[tuple[str, str]]) -> Any:
    arrow = pyarrow()
    types = {
        "string": arrow.string(),
        "bool": arrow.bool_(),
        "list<string>": arrow.list_(arrow.string()),
        "list<double>": arrow.list_(arrow.float64()),
    }
    return arrow.schema([(name, types[kind]) for name, kind in columns])
