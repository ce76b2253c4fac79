"""Reads an index: the codes of every item, as a project wrote them.

| file                  | content                                                        | project                     |
|-----------------------|----------------------------------------------------------------|-----------------------------|
| *.json                | {"item": ["<a_1>", "<b_2>"], ...}                              | LC-Rec, MiniOneRec, MIMIGenRec |
| *.json                | {"number": [{"pid": 7, "count": 3}, ...], ...}                 | OpenOneRec, sid2pid         |
| *.txt                 | lines of `<a_1><b_2>`, title and item, with tabs between       | MiniOneRec, info            |
| *.parquet             | columns pid and sid (a list of numbers)                        | OpenOneRec, pid2sid         |
| *.pt, *.npy           | a tensor of numbers, [items, L] or [L, items]                  | GRID, merged_predictions_tensor |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int32, Int64
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.files.lines import parse_json, read_lines
from atspeed.importing.errors import ImportingError
from atspeed.importing.layouts import PromptLayout

Numbers = npt.NDArray[np.float64]
_BRACKETED = re.compile(r"<[^<>]+>|\[[^\[\]]+\]|\{[^{}]+\}|\([^()]+\)")
_SID_BASE = 8192  # sid2pid.json is keyed by (a * 8192 + b) * 8192 + c


@dataclass(frozen=True)
class Index:
    """The codes of items, by name. Holds no Python object per code.

    Attributes:
        path: the file, for messages.
        ids: the items.
        names: the distinct names of codes.
        paths: int32 [items, L]; indices into `names`, -1 behind the end of a shorter path.
        columns: numbers of each item by column name, such as counts.
        titles: the title of each item, if the file has them.
    """

    path: Path
    ids: list[str]
    names: list[str]
    paths: Int32
    columns: dict[str, Numbers] = field(default_factory=dict)
    titles: list[str] | None = None

    @property
    def lengths(self) -> Int64:
        """Return the number of codes of each item, int64 [items]."""
        lengths: Int64 = (self.paths >= 0).sum(axis=1)
        return lengths

    @cached_property
    def rows(self) -> dict[str, int]:
        """Return the row of each item."""
        return {item: row for row, item in enumerate(self.ids)}

    @property
    def titles_by_item(self) -> dict[str, str]:
        """Return the title of each item; empty if the file has none."""
        return dict(zip(self.ids, self.titles, strict=True)) if self.titles is not None else {}


def read_index(path: Path, layout: PromptLayout) -> Index:
    """Read the index file. layout: names the tokens where the file holds numbers. Raises ImportingError."""
    if path.suffix.lower() == ".txt":
        return _of_info(path)
    if path.suffix.lower() == ".parquet":
        return _of_parquet(path, layout)
    if path.suffix.lower() in {".pt", ".npy"}:
        return _of_tensor(path, layout)
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise ImportingError(f"{path}: not an object with an item or a code path per key")
    if all(isinstance(entry, dict) for entry in _first_list(content)):
        return _of_numbered_paths(path, content, layout)
    return _of_names(path, list(content), list(content.values()))


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises ImportingError."""
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ImportingError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _first_list(content: dict[str, Any]) -> list[Any]:
    first = next(iter(content.values()))
    return first if isinstance(first, list) and first else [None]


def _of_names(path: Path, ids: list[str], rows: Sequence[Any]) -> Index:
    """Build an index from a list of names per item."""
    for item, row in zip(ids, rows, strict=True):
        if not isinstance(row, list) or not all(isinstance(name, str) and name for name in row):
            raise ImportingError(f"{path}: item {shown(item)}: its codes are not a list of names")
        if not row:
            raise ImportingError(f"{path}: item {shown(item)}: an empty path, it has no codes")
    names: dict[str, int] = {}
    flat = np.fromiter((names.setdefault(name, len(names)) for name in chain.from_iterable(rows)), dtype=np.int32)
    if (wrong := next((name for name in names if not _is_text(name)), None)) is not None:
        raise ImportingError(f"{path}: code {shown(wrong)}: not text that UTF-8 can hold")
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    paths = np.full((len(rows), int(lengths.max())), -1, dtype=np.int32)
    paths[np.arange(paths.shape[1]) < lengths[:, None]] = flat
    return Index(path, ids, list(names), paths)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def _of_info(path: Path) -> Index:
    ids, titles, rows = [], [], []
    for number, line in read_lines(path):
        parts = line.split("\t")
        names = _BRACKETED.findall(parts[0])
        if len(parts) < 3 or "".join(names) != parts[0].strip():
            raise ImportingError(
                f"{path}:{number}: not a semantic ID such as <a_1><b_2>, a title and an item, with tabs between"
            )
        ids.append(parts[-1].strip())
        titles.append("\t".join(parts[1:-1]).strip())
        rows.append(names)
    if not ids:
        raise ImportingError(f"{path}: holds no item")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(item for item in ids if item in seen or seen.add(item))  # type: ignore[func-returns-value]
        raise ImportingError(f"{path}: item {shown(twice)} occurs more than once")
    return replace(_of_names(path, ids, rows), titles=titles)


def _of_numbered_paths(path: Path, content: dict[str, Any], layout: PromptLayout) -> Index:
    """Build an index from items by the number of their path."""
    levels = len(_code_names(path, layout))
    most = _SID_BASE**levels
    digits = len(str(most))
    wrong = next((key for key in content if not (key.isdecimal() and len(key) <= digits and int(key) < most)), None)
    if wrong is not None:
        raise ImportingError(f"{path}: {shown(wrong)}: not the number of a path of {levels} codes below {_SID_BASE:,}")
    wrong = next((key for key, items in content.items() if not isinstance(items, list)), None)
    if wrong is not None:
        raise ImportingError(f"{path}: {shown(wrong)}: not a list of items")
    entries = list(chain.from_iterable(content.values()))
    if (other := next((entry for entry in entries if not isinstance(entry, dict)), None)) is not None:
        raise ImportingError(f"{path}: {other!r:.60}: not an item with pid or iid")
    try:
        ids = [str(entry["pid"] if "pid" in entry else entry["iid"]) for entry in entries]
        counted = [
            name for name, value in entries[0].items() if name not in {"pid", "iid"} and isinstance(value, int | float)
        ]
        columns = {name: np.array([entry[name] for entry in entries], dtype=np.float64) for name in counted}
    except KeyError as error:
        raise ImportingError(f"{path}: an item lacks {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ImportingError(f"{path}: {', '.join(counted)}: not a number for every item: {error}") from error
    keys = np.fromiter(map(int, content), dtype=np.int64, count=len(content))
    number = np.repeat(keys, np.fromiter(map(len, content.values()), dtype=np.int64, count=len(content)))
    codes = np.stack([number // _SID_BASE ** (levels - 1 - level) % _SID_BASE for level in range(levels)], axis=1)
    return replace(_of_codes(path, ids, codes, layout), columns=columns)


def _of_parquet(path: Path, layout: PromptLayout) -> Index:
    try:
        import pyarrow.parquet  # only this format needs the package
    except ImportError:
        raise ImportingError(f"{path}: pyarrow is not installed (extra parquet), and reads .parquet files") from None
    try:
        table = pyarrow.parquet.read_table(path, columns=["pid", "sid"])
        ids, sids = [str(item) for item in table.column("pid").to_pylist()], table.column("sid").combine_chunks()
        lengths, flat = (
            sids.value_lengths().to_numpy(zero_copy_only=False),
            sids.flatten().to_numpy(zero_copy_only=False),
        )
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise ImportingError(f"{path}: columns pid and sid cannot be read: {error}") from error
    levels = len(_code_names(path, layout))
    if (lengths != levels).any():
        raise ImportingError(f"{path}: item {shown(ids[int((lengths != levels).argmax())])}: not {levels} codes")
    return _of_codes(path, ids, flat.reshape(-1, levels), layout)


def _of_tensor(path: Path, layout: PromptLayout) -> Index:
    """Build an index from a tensor. Its items are the rows from 0 on. Nothing in the file is run."""
    levels = len(_code_names(path, layout))
    try:
        if path.suffix.lower() == ".pt":
            import torch  # histories are read without it

            table = torch.load(path, map_location="cpu", weights_only=True).numpy()
        else:
            table = np.asarray(np.load(path, allow_pickle=False))
    except Exception as error:  # torch and numpy raise almost any kind for a file that is none
        raise ImportingError(
            f"{path}: holds no tensor that can be read: {' '.join(str(error).split())[:200]}"
        ) from error
    shape = list(table.shape)
    if len(shape) != 2 or table.dtype.kind not in "iuf" or levels not in shape or not table.size:
        raise ImportingError(f"{path}: {table.dtype} {shape}, must be numbers [items, {levels}] or [{levels}, items]")
    if shape[0] == shape[1]:
        raise ImportingError(f"{path}: {shape}: has as many items as codes, so either axis could be that of the items")
    codes = table.T if shape[0] == levels else table
    if (wrong := np.flatnonzero(~((codes >= 0) & (codes == np.floor(codes))).all(axis=1))).size:
        row = int(wrong[0])
        raise ImportingError(
            f"{path}: item '{row}': {codes[row].tolist()} are not codes, which are whole numbers from 0 on"
        )
    return _of_codes(path, list(map(str, range(len(codes)))), codes.astype(np.int64), layout)


def _code_names(path: Path, layout: PromptLayout) -> tuple[str, ...]:
    if not layout.code_names:
        raise ImportingError(f"{path}: holds numbers; the layout's code_names must name their tokens, as in openonerec")
    return layout.code_names


def _of_codes(path: Path, ids: list[str], codes: npt.NDArray[np.integer], layout: PromptLayout) -> Index:
    """Build an index from numbers, [items, L]."""
    names: list[str] = []
    paths = np.empty(codes.shape, dtype=np.int32)
    for level, form in enumerate(_code_names(path, layout)):
        found, place = np.unique(codes[:, level], return_inverse=True)
        paths[:, level] = place + len(names)
        names += [form.replace("{}", str(code)) for code in found.tolist()]
    return Index(path, ids, names, paths)


def check_lengths(index: Index, *, unequal: bool) -> None:
    """Raise ImportingError, naming the item, when a path is shorter than others and that was not asked for."""
    lengths = index.lengths
    usual = int(np.bincount(lengths).argmax())
    other = np.flatnonzero(lengths != usual)
    if len(other) and not unequal:
        item, length = shown(index.ids[other[0]]), lengths[other[0]]
        raise ImportingError(
            f"{index.path}: item {item}: a path of {length} codes, others have {usual}; --unequal-paths allows it"
        )
