"""Shapes of passes on a device: buckets hold what they stand for, and their padding changes no score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder
from atspeed.engine.model.device_graph import CAPACITY_STEP
from atspeed.engine.model.device_pass import PagedInput, PassShape, buckets
from atspeed.engine.model.loading import load_device_decoder
from atspeed.engine.model.token_tree import PathPass
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue

PAGE, DEPTH, LONGEST = 4, 2, 60

lengths = st.lists(st.tuples(st.integers(0, LONGEST), st.integers(1, 30)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> DeviceDecoder:
    made = write_bundle(tmp_path_factory.mktemp("bundle"), random_catalogue(20, (4, 4, 3), seed=2))
    return load_device_decoder(made.bundle, "target", RuntimeOptions(), page_tokens=PAGE, pool_bytes=2**22)


def paged(decoder: DeviceDecoder, trees: Sequence[tuple[int, int]]) -> list[PagedInput]:
    """Trees of (cached, new) tokens in pages of their own; new tokens are a chain."""
    inputs, first = [], 0
    for cached, new in trees:
        pages = -(-(cached + new) // PAGE)
        place = np.arange(cached, cached + new)
        step = PathPass(place % 5, place, np.arange(new), place + 1, np.zeros((new, DEPTH), np.int32))
        inputs.append(PagedInput(step, decoder.slots(range(first, first + pages), cached + new)))
        first += pages
    return inputs


@given(trees=lengths)
@settings(max_examples=20)
def test_padding_to_a_bucket_changes_no_score_and_no_key(decoder: DeviceDecoder, trees: list[tuple[int, int]]) -> None:
    """Also behind another pass of the same bucket, whose inputs are still there."""
    whole = paged(decoder, [(0, cached + new) for cached, new in trees])
    inputs = paged(decoder, trees)
    pages = sorted({(slot - 2) // PAGE for tree in whole for slot in tree.slots.tolist()})
    decoder._graphs.clear()
    decoder.run(whole)
    expected = [output.code_logits for output in decoder.run(inputs)]
    keys = decoder.read_pages(pages)
    bucket = PassShape.of(inputs).bucket
    assert bucket is not None
    decoder._graphs[bucket] = made = decoder._buffers(bucket)
    full = paged(decoder, [(bucket.capacity - bucket.new, bucket.new)])
    made.run(full * bucket.batch)  # every place of the buffers has been used
    decoder.write_pages(pages, keys)
    found = decoder.run(inputs)
    for output, logits in zip(found, expected, strict=True):
        np.testing.assert_allclose(output.code_logits, logits, atol=1e-5)
    for block, kept in zip(decoder.read_pages(pages), keys, strict=True):
        np.testing.assert_allclose(block, kept, atol=1e-5)


@given(batch=st.integers(1, 70), new=st.integers(1, 80), capacity=st.integers(1, 300))
def test_a_bucket_holds_its_shape_and_is_one_of_those_that_are_captured(batch: int, new: int, capacity: int) -> None:
    shape = PassShape(batch, new * 8, capacity * CAPACITY_STEP, batch * new * 8, DEPTH)
    found = shape.bucket
    if found is not None:
        assert found.batch >= shape.batch
        assert found.new >= shape.new
        assert found.capacity >= shape.capacity
        assert found.rows == found.tokens
        assert found in set(buckets(DEPTH, shape.capacity, shape.batch))
        assert found.tokens <= max(256, shape.tokens + 128)
    elif batch == 1:
        assert shape.new > 512 or shape.capacity > 2048 or shape.new > shape.capacity


def test_buckets_are_few_and_differ() -> None:
    found = list(buckets(DEPTH, 2048, 64))
    assert len(set(found)) == len(found) <= 130
