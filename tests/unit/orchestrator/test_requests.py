"""Beam widths of a request: what they become, and what is left of them under load."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.mode import Mode
from atspeed.errors import InvalidArgumentError
from atspeed.rpc import wire
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.recommendation import RecommendParams
from orchestrator.requests import parse_request
from orchestrator.settings import OrchestratorSettings

MOST = 30
LIMITS = OrchestratorSettings(bundle=Path(), target="127.0.0.1:1", max_beam_width=MOST)
WIDTHS = st.lists(st.integers(0, MOST + 1), min_size=1, max_size=4)


def params(k: int, widths: list[int], mode: Mode = Mode.STRICT, least: int = 0) -> RecommendParams:
    request = pb.RecommendRequest(user_id="a", k=k, beam_widths=widths, mode=wire.to_mode(mode), least_beam_width=least)
    return parse_request(request, LIMITS)


@given(st.integers(1, MOST), WIDTHS, st.sampled_from(Mode))
def test_beam_widths_are_within_the_limits_and_leave_room_for_the_list(k: int, widths: list[int], mode: Mode) -> None:
    """The error names the first width at fault. An exact sample of k needs k beams on every level."""
    least = [k if mode is Mode.EXACT_SAMPLING else 1] * (len(widths) - 1) + [k]
    wrong = [place for place, width in enumerate(widths) if not least[place] <= width <= MOST]
    if not wrong:
        assert params(k, widths, mode).beam_widths == BeamWidths.of(*widths)
        return
    with pytest.raises(InvalidArgumentError) as refused:
        params(k, widths, mode)
    assert refused.value.field == f"beam_widths[{wrong[0]}]"


@given(st.integers(1, MOST), st.integers(1, 4))
def test_equal_widths_are_one_beam_width(width: int, levels: int) -> None:
    single = parse_request(pb.RecommendRequest(user_id="a", k=1, beam_width=width), LIMITS)
    assert params(1, [width] * levels) == single


def test_a_busy_service_narrows_every_level() -> None:
    """Levels that are narrow enough stay as they are; the list still has room."""
    narrowed = params(5, [2, 20, 9], least=8).narrowed()
    assert (narrowed.beam_widths, narrowed.requested_beam_widths) == (BeamWidths.of(2, 8), BeamWidths.of(2, 20, 9))
    wide = params(5, [2, 20, 9], least=20)
    assert wide.narrowed() is wide
