"""Files of lists: one of each chunk of users, complete or absent.

lists/run.json                what the run was asked for; a resumed run must ask for the same
lists/chunk-00000000.parquet  the lists of the first chunk, in the order of the users
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from atspeed.batch.errors import BatchError
from atspeed.batch.parquet import count_rows, pyarrow, write_rows
from atspeed.engine.files.atomic_write import replace_text, replacing
from atspeed_client import CallError, Recommendation

ListFormat = Literal["parquet", "jsonl"]
RUN = "run.json"
_COLUMNS = (
    ("user_id", "string"),
    ("item_ids", "list<string>"),
    ("scores", "list<double>"),
    ("recommendation_id", "string"),
    ("error", "string"),
    ("exact", "bool"),
    ("degraded", "bool"),
    ("target_model", "string"),
    ("draft_model", "string"),
    ("catalogue", "string"),
    ("bundle", "string"),
)


@dataclass(frozen=True)
class UserList:
    """The list of one user, or why there is none.

    Attributes:
        item_ids: best first; empty without a list.
        scores: log-probabilities of the items' code paths.
        recommendation_id: the id that events name for attribution.
        error: why there is no list, as CODE: text; None with a list.
        exact: whether it is the target's own list.
        degraded: whether the service did without something, such as its draft.
        target_model, draft_model, catalogue, bundle: the versions that made it.
    """

    user_id: str
    item_ids: Sequence[str] = ()
    scores: Sequence[float] = ()
    recommendation_id: str = ""
    error: str | None = None
    exact: bool = False
    degraded: bool = False
    target_model: str = ""
    draft_model: str = ""
    catalogue: str = ""
    bundle: str = ""

    @classmethod
    def of(cls, user_id: str, outcome: Recommendation | CallError) -> Self:
        """Return a user's row with a list, or with the reason why there is none."""
        if isinstance(outcome, CallError):
            return cls(user_id, error=str(outcome))
        return cls(
            user_id=user_id,
            item_ids=outcome.item_ids,
            scores=[item.score for item in outcome.items],
            recommendation_id=outcome.recommendation_id,
            exact=outcome.exactness.exact,
            degraded=outcome.degraded,
            **asdict(outcome.versions),
        )


class ListFolder:
    """The folder of a run. Several processes may write different chunks of it at once."""

    def __init__(self, folder: Path, form: ListFormat) -> None:
        self.folder = folder
        self._form = form

    def begin(self, asked: dict[str, Any]) -> None:
        """Begin or resume a run.

        Raises BatchError naming the first option that an earlier run in the folder had otherwise, and, before anything is
        written, for a format whose package is not installed.
        """
        if self._form == "parquet":
            pyarrow()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN
        if not path.exists():
            if any(self.folder.iterdir()):
                raise BatchError(f"{self.folder}: is not empty, and no run began there: it has no {RUN}")
            replace_text(path, json.dumps(asked, indent=1) + "\n")
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BatchError(f"{path}: {error}") from None
        for name in asked:
            if before.get(name) != asked[name]:
                raise BatchError(
                    f"{path}: {name}: the run began with {before.get(name)!r}, not {asked[name]!r}; use another --out"
                )

    def path(self, number: int) -> Path:
        """Return the file of a chunk."""
        return self.folder / f"chunk-{number:08}.{self._form}"

    def holds(self, number: int, users: int) -> bool:
        """Return whether a chunk's lists are there. Raises BatchError if their number is not that of the users."""
        path = self.path(number)
        if not path.exists():
            return False
        if (found := self._count(path)) != users:
            raise BatchError(f"{path}: holds {found} lists instead of {users}; remove it, and resume")
        return True

    def write(self, number: int, lists: Sequence[UserList]) -> None:
        """Write the lists of a chunk in one step, and read back their number."""
        rows, path = [asdict(one) for one in lists], self.path(number)
        for partial in self.folder.glob(f".{path.name}.*.partial"):  # left by a process that was killed
            partial.unlink(missing_ok=True)
        with replacing(path) as file:
            if self._form == "parquet":
                write_rows(file, rows, _COLUMNS)
            else:
                file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows)
        if not self.holds(number, len(lists)):
            raise BatchError(f"{self.path(number)}: is not there after it was written")

    def _count(self, path: Path) -> int:
        if self._form == "parquet":
            return count_rows(path)
        with path.open("rb") as file:
            return sum(1 for _ in file)
