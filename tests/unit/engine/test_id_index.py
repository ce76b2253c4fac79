"""The hash table of ids against a dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.bundle import id_index
from atspeed.engine.bundle.id_index import IdIndex

# Few letters and many lengths, so that ids share words of eight bytes and differ in one of several.
spelled = st.text("ab", min_size=1, max_size=20).map(str.encode)


@given(st.lists(spelled, min_size=1, max_size=40, unique=True), st.lists(spelled, max_size=20), st.integers(20, 40))
def test_every_id_is_found_and_no_other(ids: list[bytes], guesses: list[bytes], width: int) -> None:
    index = IdIndex.of(np.array(ids, dtype=f"S{width}"))
    place = {item: number for number, item in enumerate(ids)}
    keys = [*ids, *guesses, b""]
    assert index.find(np.array(keys, dtype=f"S{width}")).tolist() == [place.get(key, -1) for key in keys]
    assert index.find(np.empty(0, dtype=f"S{width}")).tolist() == []
    assert sorted(index.item.tolist()) == list(range(len(ids)))


@given(st.sets(st.integers(0, 10**9), min_size=1, max_size=300), st.integers(1, 5))
def test_ids_are_hashed_in_chunks(numbers: set[int], chunk: int) -> None:
    """The table does not depend on how many ids are hashed at once."""
    ids = np.array([str(number).encode() for number in sorted(numbers)])
    whole = IdIndex.of(ids)
    usual = id_index._CHUNK
    try:
        id_index._CHUNK = chunk
        in_parts = IdIndex.of(ids)
    finally:
        id_index._CHUNK = usual
    assert in_parts.start.tolist() == whole.start.tolist()
    assert in_parts.find(ids).tolist() == list(range(len(ids)))


def test_ids_of_one_bucket_are_distinguished() -> None:
    """A table of one bucket, as if all hashes were equal."""
    ids = np.array([b"a", b"b", b"c"])
    table = IdIndex(ids, np.array([2, 0, 1], dtype=np.int32), np.array([0, 3], dtype=np.int32))
    assert table.find(np.array([b"c", b"x", b"a", b"b"])).tolist() == [2, -1, 0, 1]
