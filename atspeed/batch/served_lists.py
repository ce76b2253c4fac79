"""Lists of a batch from a running service, at batch priority."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from atspeed.batch.lists import UserList
from atspeed.batch.run import ListUsers
from atspeed.batch.users import User
from atspeed_client import CallError, Client, Priority, Recommendation, RecommendRequest

# The user's own request is at fault. Any other failure is the service's or the caller's, and would befall the next user too.
_OF_THE_USER = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INTERNAL}


def served_lists(client: Client, options: dict[str, Any], *, concurrency: int) -> ListUsers:
    """Return the maker of lists that asks a service. A user without a history in the file has the stored one.

    The client's retries bridge a busy service. What fails after them ends the batch with CallError.

    options: those of `RecommendRequest`, without the user. concurrency: calls at once.
    """

    def outcome(user: User) -> Recommendation | CallError:
        subject: dict[str, Any] = {"user_id": user.user_id} if user.history is None else {"history": user.history}
        subject["user_fields"] = user.user_fields
        try:
            return client.send(RecommendRequest(**subject, priority=Priority.BATCH, statistics=False, **options))
        except CallError as error:
            if error.code in _OF_THE_USER:
                return error
            raise

    def lists(users: Iterable[User]) -> Generator[UserList]:
        asked = list(users)
        with ThreadPoolExecutor(concurrency) as pool:
            outcomes = pool.map(outcome, asked)
            try:
                for user, found in zip(asked, outcomes, strict=True):
                    yield UserList.of(user.user_id, found)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return lists
