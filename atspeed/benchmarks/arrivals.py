"""Arrivals of new, returning and refreshing users: a Poisson process, by a seed.

A new user has a history without its newest items. A returning user has one item more than before. A refreshing user repeats the
last request. A prefix cache can save none, nearly all and all of their prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

import numpy as np

from atspeed.benchmarks.histories import History
from atspeed.benchmarks.results import BenchmarkError

_HELD_BACK = 4  # newest items of a history that a new user does not have yet


class UserKind(StrEnum):
    """Kind of user, by how much of the prompt a cache can know."""

    NEW = "new"
    RETURNING = "returning"
    REFRESHING = "refreshing"


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of users. They need not sum to 1. The first request of a user is always new."""

    new: float = 0.2
    returning: float = 0.5
    refreshing: float = 0.3

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Parse `new=0.2,returning=0.5,refreshing=0.3`. Kinds that are not named have the share 0. Raises BenchmarkError."""
        names = [field.name for field in fields(cls)]
        shares = dict.fromkeys(names, 0.0)
        for part in text.split(","):
            name, _, share = part.partition("=")
            try:
                shares[name] = float(share)
            except ValueError:
                shares[name] = -1.0
            if name not in names or not 0 <= shares[name] < np.inf:
                raise BenchmarkError(f"mix: {part!r} is not one of {', '.join(f'{name}=SHARE' for name in names)}")
        if not sum(shares.values()):
            raise BenchmarkError("mix: all shares are 0")
        return cls(**shares)

    @property
    def probabilities(self) -> list[float]:
        """Probability of each kind, in the order of `UserKind`."""
        shares = [self.new, self.returning, self.refreshing]
        return [share / sum(shares) for share in shares]


@dataclass(frozen=True)
class Arrival:
    """One request. at: seconds after the start. cohort: a history is used once in each cohort, by another user each time."""

    at: float
    kind: UserKind
    history: History
    cohort: int


@dataclass
class _User:
    """User of earlier requests, with so many items of the history."""

    history: History
    items: int
    cohort: int


def plan_arrivals(histories: Sequence[History], mix: Mix, *, rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Return the arrivals of a Poisson process of `rate` per second, by time."""
    rng = np.random.default_rng(seed)
    # Gaps enough for ten standard deviations more than the expected number of arrivals.
    gaps = rng.exponential(1 / rate, size=int(rate * seconds + 10 * np.sqrt(rate * seconds) + 10))
    times = np.cumsum(gaps)
    times = times[times < seconds]
    drawn = rng.choice(len(UserKind), size=len(times), p=mix.probabilities)
    population = _Population(histories, rng)
    return [population.arrival(float(at), list(UserKind)[kind]) for at, kind in zip(times, drawn.tolist(), strict=True)]


class _Population:
    """Users so far, and histories of users to come."""

    def __init__(self, histories: Sequence[History], rng: np.random.Generator) -> None:
        self._histories = histories
        self._rng = rng
        self._order = rng.permutation(len(histories))
        self._users: list[_User] = []

    def arrival(self, at: float, kind: UserKind) -> Arrival:
        user = self._known(kind)
        if user is None:
            kind, user = UserKind.NEW, self._newcomer()
        user.items += kind is UserKind.RETURNING
        return Arrival(at, kind, user.history[: user.items], user.cohort)

    def _known(self, kind: UserKind) -> _User | None:
        """Draw a user who can be of this kind; None where there is none."""
        if kind is UserKind.NEW:
            return None
        some = [user for user in self._users if kind is UserKind.REFRESHING or user.items < len(user.history)]
        return some[int(self._rng.integers(len(some)))] if some else None

    def _newcomer(self) -> _User:
        cohort, place = divmod(len(self._users), len(self._histories))
        history = self._histories[self._order[place]]
        user = _User(history, max(1, len(history) - _HELD_BACK), cohort)
        self._users.append(user)
        return user
