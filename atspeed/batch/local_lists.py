"""Lists of a batch from the models of a bundle, in this process."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any

from atspeed.batch.lists import UserList
from atspeed.batch.run import ListUsers
from atspeed.batch.users import User
from atspeed.client.recommender import recommend_request
from atspeed.errors import ServiceError
from atspeed.local.recommender import Recommender
from atspeed.v1 import recommendation_pb2 as pb


def local_lists(recommender: Recommender, options: dict[str, Any], *, concurrency: int) -> ListUsers:
    """Return the maker of lists that asks a recommender in this process.

    options: those of `recommend_request`, without the user. concurrency: lists at once; they share passes.
    """

    def lists(users: Iterable[User]) -> Generator[UserList]:
        asked = list(users)
        outcomes = recommender.recommend_many(_requests(asked, options), concurrency=concurrency)
        for user, outcome in zip(asked, outcomes, strict=True):
            yield _list(user, outcome)

    return lists


def _requests(users: Iterable[User], options: dict[str, Any]) -> Iterator[pb.RecommendRequest]:
    for user in users:
        yield recommend_request(history=user.history or (), **options)


def _list(user: User, outcome: pb.RecommendResponse | ServiceError) -> UserList:
    if isinstance(outcome, ServiceError):
        return UserList(user.user_id, error=f"{outcome.code}: {outcome}")
    return user_list(user, outcome)


def user_list(user: User, reply: pb.RecommendResponse) -> UserList:
    """Return a reply's list as a row."""
    versions = reply.versions
    return UserList(
        user_id=user.user_id,
        item_ids=[item.item_id for item in reply.items],
        scores=[item.score for item in reply.items],
        exact=reply.exactness.exact,
        degraded=reply.degraded,
        target_model=versions.target_model,
        draft_model=versions.draft_model,
        catalogue=versions.catalogue,
        bundle=versions.bundle,
    )
