"""What passes cost survives the wire, and what a replica of an older version does not say counts as nothing."""

from __future__ import annotations

from dataclasses import fields

from atspeed.v1 import types_pb2
from hypothesis import given
from hypothesis import strategies as st

from engine.cost import PassCost
from service_kit import wire

COUNTS = st.integers(0, 2**32 - 1)


@given(st.builds(PassCost, **dict.fromkeys((field.name for field in fields(PassCost)), COUNTS)))
def test_costs_survive_the_wire(cost: PassCost) -> None:
    sent = wire.to_statistics(cost).SerializeToString()
    assert wire.pass_cost(types_pb2.PassStatistics.FromString(sent), "statistics") == cost


def test_a_replica_that_does_not_tell_its_look_ups_has_none() -> None:
    older = types_pb2.PassStatistics(queue_ns=7, forward_ns=5, new_tokens=3)
    assert wire.pass_cost(older, "statistics") == PassCost(queue_ns=7, forward_ns=5, new_tokens=3, lookup_ns=0)
