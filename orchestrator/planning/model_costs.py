"""What calls of both models cost, learnt from every request."""

from __future__ import annotations

from atspeed.engine.speculation.ewma import Ewma
from atspeed.engine.speculation.latency_model import LatencyModel


class ModelCosts:
    """The costs of each, and of the prompts what they find cached.

    share: of the target's prompt, how much is computed, by whether the draft had found some of its own cached (None: it was not
    asked yet). draft_share: the same of the draft's.
    """

    def __init__(self, target: LatencyModel, draft: LatencyModel) -> None:
        self.target, self.draft = target, draft
        self.share: dict[bool | None, Ewma] = {key: Ewma(1.0) for key in (None, False, True)}
        self.draft_share = Ewma(1.0)
