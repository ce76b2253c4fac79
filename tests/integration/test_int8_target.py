"""A target that multiplies in 8 bits, through real services: lists are the same to the last bit, whatever was drafted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atspeed.benchmarks.histories import choose_histories
from atspeed.benchmarks.services import ServiceOptions, ask, progress_bar, services
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.scoring import ScoringRule
from atspeed_client import RecommendRequest
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue

USERS = 24


@pytest.mark.parametrize(
    ("rule", "architecture"), [*((rule, "llama") for rule in ScoringRule), (ScoringRule.VOCAB, "t5")]
)
async def test_scores_of_strict_lists_are_the_bits_of_target_only(
    rule: ScoringRule, architecture: str, tmp_path: Path
) -> None:
    """Drafted and not, cold and on cached keys, several at once in a pass: float32 can only promise 1e-5."""
    catalogue = random_catalogue(300, (16, 12, 10), seed=3)
    drafts: dict[str, Any] = {"draft_architecture": "llama"} if architecture == "t5" else {"draft_noise": 0.1}
    made = write_bundle(tmp_path, catalogue, rule=rule, precision="int8", architecture=architecture, **drafts)
    histories = choose_histories(catalogue, None, USERS, seed=7)
    found: dict[Mode, list[list[tuple[str, float]]]] = {}
    passes = {}
    async with services(made.root, ServiceOptions(planner="fixed")) as client:
        for mode in (Mode.TARGET_ONLY, Mode.STRICT):
            requests = [
                RecommendRequest(history=own, k=k, beam_width=k, mode=mode) for k in (1, 10) for own in histories
            ]
            with progress_bar() as progress:
                replies = await ask(client, requests, progress=progress, title=mode)
            assert all(reply.exactness.exact for reply in replies)
            found[mode] = [[(item.item_id, item.score) for item in reply.items] for reply in replies]
            passes[mode] = sum(reply.statistics.target_passes for reply in replies)
    assert found[Mode.STRICT] == found[Mode.TARGET_ONLY]
    assert passes[Mode.STRICT] < passes[Mode.TARGET_ONLY]
