"""Calls of CUDA of a selection on the device: one copy in, one copy back that is as short as the lists, no node on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder
from atspeed.engine.model.device_selection import RowSelection
from atspeed.engine.model.device_selector import DeviceSelector
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Perturbation, ScoringRule
from atspeed.engine.search.trie import Pruning, Trie
from tests.catalogues import random_catalogue
from tests.cuda.dry_run import Counts, Place
from tests.cuda.passes import paged_inputs, placement, profiled, second
from tests.cuda.shapes import CODE_TOKENS, TINY, open_device_shape, write_shape

LIMIT = 20
NODES = 120
SELECTION = 30  # kernels at most
EVERYTHING = Selection(Pruning.none(), LIMIT)


@pytest.fixture(scope="module")
def trie() -> Trie:
    return random_catalogue(3000, (256, 256, 256), seed=0).trie


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> DeviceDecoder:
    return open_device_shape(write_shape(tmp_path_factory.mktemp("tiny"), TINY, "float16"), TINY)


def selecting(decoder: DeviceDecoder, rule: ScoringRule, trie: Trie) -> DeviceSelector:
    return DeviceSelector(trie, rule, np.asarray(CODE_TOKENS), RuntimeOptions(provider="cuda"), decoder.stream)


def rows_of(trie: Trie, selection: Selection) -> RowSelection:
    return RowSelection(trie.readable()[1 : NODES + 1], selection)


def counted_selection(decoder: DeviceDecoder, selector: DeviceSelector, rows: RowSelection) -> Counts:
    """Count the calls of a pass of 120 nodes behind 1,000 tokens with its selection, the second of its kind."""
    inputs = paged_inputs(decoder, [(1000, NODES)])
    return second(lambda: decoder.run_and_select(inputs, selector, [rows]))


@pytest.mark.parametrize("rule", ScoringRule)
def test_only_the_chosen_children_come_back(decoder: DeviceDecoder, trie: Trie, rule: ScoringRule) -> None:
    excluded = Pruning.of_dead_leaves(trie, np.arange(trie.nodes - 200, trie.nodes))
    made = counted_selection(decoder, selecting(decoder, rule, trie), rows_of(trie, Selection(excluded, LIMIT)))
    [back] = made.to_host
    assert back.bytes <= NODES * (2 * 4 * (LIMIT + 4) + 8) + 4 * 256
    assert back.bytes < 4 * len(CODE_TOKENS) * NODES / 10
    assert [copy.source for copy in made.to_device] == [Place.PINNED] * 2
    assert sum(copy.bytes for copy in made.to_device) < 30_000
    assert made.synchronisations == {"cudaStreamSynchronize": 1}  # for the pass and the selection
    assert made.launches <= 18 * TINY.layers + 20 + SELECTION
    assert not made.allocated
    assert not made.pinned


def test_a_replayed_pass_and_its_selection_wait_once(trie: Trie, tmp_path: Path) -> None:
    decoder = open_device_shape(write_shape(tmp_path, TINY, "float16"), TINY)
    decoder.capture(3, 2048, trees=1)
    made = counted_selection(decoder, selecting(decoder, ScoringRule.VOCAB, trie), rows_of(trie, EVERYTHING))
    assert len(made.replays) == 1
    assert made.launches <= 1 + SELECTION
    assert made.synchronisations.total() == 1
    assert (len(made.to_device), len(made.to_host)) == (2, 1)


def test_noise_is_the_only_input_as_wide_as_the_catalogues_nodes(decoder: DeviceDecoder, trie: Trie) -> None:
    perturbed = Selection(Pruning.none(), LIMIT, Perturbation(seed=1, temperature=1.0))
    made = counted_selection(decoder, selecting(decoder, ScoringRule.VOCAB, trie), rows_of(trie, perturbed))
    assert len(made.to_device) == 2
    width = int(trie.child_count.max()) + 8
    assert sum(copy.bytes for copy in made.to_device) < 30_000 + NODES * 4 * width


@pytest.mark.parametrize("rule", ScoringRule)
def test_every_node_runs_on_the_device(decoder: DeviceDecoder, trie: Trie, rule: ScoringRule, tmp_path: Path) -> None:
    selector = selecting(decoder, rule, trie)
    rows = rows_of(trie, EVERYTHING)
    with profiled(tmp_path / "profile"):
        decoder.run_and_select(paged_inputs(decoder, [(1000, NODES)]), selector, [rows])
    placed = placement(selector._session)
    assert {op for provider, op in placed if provider == "CPU"} <= {"Shape"}
    assert not [op for _, op in placed if op.startswith("Memcpy")]
