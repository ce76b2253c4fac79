"""Who asks when: Poisson arrivals of new, returning and refreshing users, a pure function of the seed.

A new user brings a history without its newest items, a returning one comes back with one item more, a refreshing one asks the
same again. What a prefix cache can save is nothing, nearly all, and all of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

import numpy as np

from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.histories import History

_HELD_BACK = 4  # newest items of a history that a new user does not have yet


class Kind(StrEnum):
    """What a cache knows of whoever asks."""

    NEW = "new"
    RETURNING = "returning"
    REFRESHING = "refreshing"


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds. They need not sum to 1; a user who is yet to come is new, whatever was drawn."""

    new: float = 0.2
    returning: float = 0.5
    refreshing: float = 0.3

    @classmethod
    def parse(cls, text: str) -> Mix:
        """From `new=0.2,returning=0.5,refreshing=0.3`; what is not named is 0. Raises BenchmarkError."""
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
    def law(self) -> list[float]:
        """Probability of each kind, in the order of `Kind`."""
        shares = [self.new, self.returning, self.refreshing]
        return [share / sum(shares) for share in shares]


@dataclass(frozen=True)
class Arrival:
    """One request. at: seconds after the start. cohort: histories are taken once per cohort, so equal ones are other users."""

    at: float
    kind: Kind
    history: History
    cohort: int


@dataclass
class _User:
    """Someone who has asked before, with so many items of the history."""

    history: History
    items: int
    cohort: int


def plan_arrivals(histories: Sequence[History], mix: Mix, *, rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Arrivals of a Poisson process of `rate` per second, by time."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate, size=int(rate * seconds + 10 * np.sqrt(rate * seconds) + 10))
    times = np.cumsum(gaps)
    times = times[times < seconds]
    drawn = rng.choice(len(Kind), size=len(times), p=mix.law)
    crowd = _Crowd(histories, rng)
    return [crowd.arrival(float(at), list(Kind)[kind]) for at, kind in zip(times, drawn.tolist(), strict=True)]


class _Crowd:
    """The users so far, and those yet to come."""

    def __init__(self, histories: Sequence[History], rng: np.random.Generator) -> None:
        self._histories, self._rng = histories, rng
        self._order = rng.permutation(len(histories))
        self._users: list[_User] = []

    def arrival(self, at: float, kind: Kind) -> Arrival:
        user = self._known(kind)
        if user is None:
            kind, user = Kind.NEW, self._newcomer()
        user.items += kind is Kind.RETURNING
        return Arrival(at, kind, user.history[: user.items], user.cohort)

    def _known(self, kind: Kind) -> _User | None:
        """Somebody of this kind; None where nobody is."""
        if kind is Kind.NEW:
            return None
        some = [user for user in self._users if kind is Kind.REFRESHING or user.items < len(user.history)]
        return some[int(self._rng.integers(len(some)))] if some else None

    def _newcomer(self) -> _User:
        cohort, place = divmod(len(self._users), len(self._histories))
        history = self._histories[self._order[place]]
        user = _User(history, max(1, len(history) - _HELD_BACK), cohort)
        self._users.append(user)
        return user
