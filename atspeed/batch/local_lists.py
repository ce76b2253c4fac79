"""Lists of a batch from the models of a bundle, in this process."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

from atspeed.batch.lists import UserList
from atspeed.batch.run import ListUsers
from atspeed.batch.users import User
from atspeed.local.recommender import Recommender
from atspeed_client import RecommendRequest


def local_lists(recommender: Recommender, options: dict[str, Any], *, concurrency: int) -> ListUsers:
    """Return the maker of lists that asks a recommender in this process.

    options: those of `RecommendRequest`, without the user. concurrency: lists at once; they share passes.
    """

    def lists(users: Iterable[User]) -> Generator[UserList]:
        asked = list(users)
        requests = (
            RecommendRequest(history=user.history or (), user_fields=user.user_fields, **options) for user in asked
        )
        outcomes = recommender.recommend_many(requests, concurrency=concurrency)
        for user, outcome in zip(asked, outcomes, strict=True):
            yield UserList.of(user.user_id, outcome)

    return lists
