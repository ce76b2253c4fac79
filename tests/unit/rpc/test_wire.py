"""Costs and modes survive the wire; what a replica of an older version does not say counts as nothing."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.mode import Mode
from atspeed.errors import InvalidArgumentError
from atspeed.rpc import wire
from atspeed.v1 import draft_pb2, recommendation_pb2, target_pb2, types_pb2
from tests.catalogues import random_catalogue
from tests.oracles.worlds import beam_widths

COUNTS = st.integers(0, 2**31 - 1)
FOUR_LEVELS = random_catalogue(20, (4, 4, 4, 4), seed=1).trie
TIERS = st.dictionaries(st.text(max_size=8), COUNTS, max_size=4)


STATS = dict.fromkeys((field.name for field in fields(PassStats)), COUNTS) | {"cached_tokens_by_tier": TIERS}


@given(st.builds(PassStats, **STATS))
def test_costs_survive_the_wire(cost: PassStats) -> None:
    sent = wire.to_statistics(cost).SerializeToString()
    assert wire.pass_stats(types_pb2.PassStatistics.FromString(sent), "statistics") == cost


def test_a_replica_that_does_not_tell_its_look_ups_has_none() -> None:
    older = types_pb2.PassStatistics(queue_ms=7e-6, forward_ms=5e-6, new_tokens=3)
    assert wire.pass_stats(older, "statistics") == PassStats(queue_ns=7, forward_ns=5, new_tokens=3, lookup_ns=0)


@pytest.mark.parametrize("cached", [{"memory": 2**60}, {f"tier {number}": 1 for number in range(17)}])
def test_pass_stats_beyond_all_bounds_are_refused(cached: dict[str, int]) -> None:
    message = types_pb2.PassStatistics(cached_tokens=cached)
    with pytest.raises(InvalidArgumentError, match="statistics"):
        wire.pass_stats(message, "statistics")


@given(beam_widths)
def test_beam_widths_survive_the_wire(widths: BeamWidths) -> None:
    """One width for all levels is sent as before there were others."""
    start = target_pb2.EvaluateStart(beam_width=widths.largest, beam_widths=widths.per_level)
    assert wire.beam_widths(start, "start.", FOUR_LEVELS) == widths
    single = target_pb2.EvaluateStart(beam_width=widths.largest)
    assert (start == single) == (wire.beam_widths(single, "start.", FOUR_LEVELS) == widths)


@pytest.mark.parametrize("widths", [[0, 5], [4, 3], [6, 5], [5] * 5])
def test_beam_widths_that_are_none_are_refused(widths: list[int]) -> None:
    message = draft_pb2.PlanRequest(beam_width=5, beam_widths=widths)
    with pytest.raises(InvalidArgumentError, match="beam_widths: "):
        wire.beam_widths(message, "", FOUR_LEVELS)


def test_every_mode_of_the_contract_has_a_name() -> None:
    """A new mode in the proto needs one."""
    values = {wire.to_mode(mode): mode for mode in Mode}
    assert values.keys() == set(recommendation_pb2.Mode.values()) - {recommendation_pb2.MODE_UNSPECIFIED}
    assert {value: wire.mode(value, "mode") for value in values} == values


def test_unspecified_mode_is_strict_and_unknown_modes_are_refused() -> None:
    assert wire.mode(recommendation_pb2.MODE_UNSPECIFIED, "mode") is Mode.STRICT
    unknown: recommendation_pb2.Mode.ValueType = max(recommendation_pb2.Mode.values()) + 1  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError, match=r"some\.mode: .* is not a mode of this service"):
        wire.mode(unknown, "some.mode")
