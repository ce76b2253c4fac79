"""A batch: the lists of a shard's users that are not there yet, chunk by chunk."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from atspeed.batch.lists import ListFolder, UserList
from atspeed.batch.users import Chunk, User, fingerprint, read_chunks

# Lists of users, in their order. What cannot be listed is a list with an error; another exception ends the batch.
ListUsers = Callable[[Iterable[User]], Generator[UserList]]


@dataclass(frozen=True)
class Shard:
    """Part of the users: every `count`-th chunk from the `index`-th on, counted from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read I/N with 1 <= I <= N. Raises ValueError."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"{text[:40]!r} is not I/N with I from 1 to N")
        return cls(int(match[1]) - 1, int(match[2]))

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk.number % self.count == self.index


@dataclass
class Progress:
    """Counts of a batch. users: those of the shard so far; skipped: those whose lists were there; failed: without a list."""

    users: int = 0
    skipped: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Batch:
    """The users of a file whose lists go into a folder.

    A chunk whose file is there is not computed again. So a batch that was killed loses at most the chunk that it worked on, and
    a resumed one lists every user once.

    Attributes:
        users: the file of users.
        folder: the folder of the lists.
        chunk_users: users of a chunk.
        shard: the part of the users.
    """

    users: Path
    folder: ListFolder
    chunk_users: int
    shard: Shard

    def begin(self, asked: dict[str, Any]) -> int:
        """Read the whole file, and begin or resume a run. Returns the number of users of the shard.

        asked: the options that decide the lists; a run in the folder must have begun with the same. Raises BatchError or
        LineError, before anything is written, for a file with a mistake.
        """
        count = sum(len(chunk.users) for chunk in self._chunks())
        self.folder.begin({**asked, "users_sha256": fingerprint(self.users), "chunk_users": self.chunk_users})
        return count

    def run(self, list_users: ListUsers, on_progress: Callable[[Progress], None]) -> Progress:
        """Make the lists that are not there. Raises BatchError, or what `list_users` raises.

        on_progress: is called after every list, and after every chunk that is skipped.
        """
        progress = Progress()
        for chunk in self._chunks():
            if self.folder.holds(chunk.number, len(chunk.users)):
                progress.users += len(chunk.users)
                progress.skipped += len(chunk.users)
                on_progress(progress)
            else:
                self.folder.write(chunk.number, _lists(chunk.users, list_users, progress, on_progress))
        return progress

    def _chunks(self) -> Iterator[Chunk]:
        return (chunk for chunk in read_chunks(self.users, self.chunk_users) if chunk in self.shard)


def _lists(
    users: Sequence[User], list_users: ListUsers, progress: Progress, on_progress: Callable[[Progress], None]
) -> list[UserList]:
    made: list[UserList] = []
    for one in list_users(users):
        made.append(one)
        progress.users += 1
        progress.failed += one.error is not None
        on_progress(progress)
    return made
