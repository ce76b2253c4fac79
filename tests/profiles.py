"""Two sizes of property tests and tests of laws: the profile `quick`, and `deep`.

`pytest` runs the unit tests under `quick`. `tests/integration/test_deep_properties.py` runs them again under `deep`.
"""

from __future__ import annotations

from hypothesis import settings

DEEP = "deep"
QUICK = "quick"


def register() -> None:
    """Register both profiles and load `quick`; pytest's option `--hypothesis-profile` loads the other one after that."""
    # How long an example takes says more about the machine than about the code.
    settings.register_profile(QUICK, deadline=None, max_examples=20)
    settings.register_profile(DEEP, deadline=None, max_examples=100)
    settings.load_profile(QUICK)


def either(quick: int, deep: int) -> int:
    """The number of examples or draws under the current profile."""
    return deep if settings.get_current_profile_name() == DEEP else quick
