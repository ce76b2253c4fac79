"""Lists of a batch as a Ray Data job; needs the extra `ray`.

    import ray
    from atspeed.batch.ray_lists import lists_of

    users = ray.data.read_parquet("s3://bucket/users")          # columns user_id and history
    lists_of(users, "/models/bundle", {"k": 50}, workers=16).write_parquet("s3://bucket/lists")

Ray moves the users and the lists, starts workers on the cluster's machines and restarts those that die. Every machine needs
the bundle at the same path. The columns are those of `UserList`.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atspeed.batch.lists import UserList
from atspeed.batch.local_lists import local_lists
from atspeed.batch.users import parse_user
from atspeed.local.recommender import Recommender, RecommenderOptions

if TYPE_CHECKING:
    from ray.data import Dataset

_BATCH_USERS = 256  # users of one call; an interrupted worker repeats at most as many


def lists_of(
    users: Dataset,
    bundle: Path | str,
    options: dict[str, Any],
    *,
    workers: int,
    threads: int = 2,
    concurrency: int = 16,
) -> Dataset:
    """Return the lists of a data set of users, lazily; a user without a list has a row with an error.

    Args:
        users: rows with user_id (text), history (list of item ids, oldest first) and, where the bundle's prompts hold fields of
            users, user_fields (values by name).
        bundle: the folder of the bundle, on every machine.
        options: those of `RecommendRequest`, without the user.
        workers: processes; each loads the bundle once and has `threads` CPUs.
        threads: CPU threads of one pass.
        concurrency: lists at once in a worker; they share passes.
    """
    from ray.data import ActorPoolStrategy

    return users.map_batches(
        ListUsers,
        fn_constructor_kwargs={
            "bundle": str(bundle),
            "options": options,
            "threads": threads,
            "concurrency": concurrency,
        },
        batch_size=_BATCH_USERS,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=threads,
    )


class ListUsers:
    """A worker: a recommender of its own, called with columns of users."""

    def __init__(self, bundle: str, options: dict[str, Any], threads: int, concurrency: int) -> None:
        self._recommender = Recommender(bundle, RecommenderOptions(threads=threads))
        self._lists = local_lists(self._recommender, options, concurrency=concurrency)

    def __call__(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return the columns of the users' lists. Raises BatchError naming the user whose row is no user."""
        none = [None] * len(columns["user_id"])
        histories, values = columns.get("history", none), columns.get("user_fields", none)
        users = [
            parse_user(
                f"user {user_id}",
                {
                    "user_id": str(user_id),
                    "history": None if history is None else list(history),
                    "user_fields": user_fields,
                },
            )
            for user_id, history, user_fields in zip(columns["user_id"], histories, values, strict=True)
        ]
        rows = [asdict(one) for one in self._lists(users)]
        return {field.name: _column([row[field.name] for row in rows]) for field in fields(UserList)}


def _column(values: list[Any]) -> Any:
    """Return a column; lists of unequal length as an array of objects."""
    if not values or not isinstance(values[0], (list, tuple)):
        return np.array(values)
    column = np.empty(len(values), dtype=object)
    column[:] = [np.array(value) for value in values]
    return column
