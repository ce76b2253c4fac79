"""Keys and values of prefixes in the dry run: a hit on the replica copies none, and a cold prompt's go after the answer.

Kernels compute nothing, so what is found is not looked at; tests/integration/models/test_device_memory.py does that on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.device_memory import DeviceMemory
from atspeed.engine.model.device_selection import DeviceSelection, RowSelection, Selected
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection, TreeSession
from atspeed.engine.search.trie import Pruning
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.cuda.dry_run import Counts, counted
from tests.oracles.models import BLOCK_TOKENS, DictStore, Models

SELECTION = Selection(Pruning.none(), limit=5)
USER, OTHER = b"user-one", b"user-two"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    host = Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), random_catalogue(40, (6, 5, 4), seed=2)))
    options = RuntimeOptions(provider="cuda")
    return Models(host.bundle, host.catalogue, host.naive, host.decoders, paged=True, options=options)


async def first_pass(evaluator: TreeEvaluator, models: Models, user: bytes) -> TreeSession:
    tree = await evaluator.open(models.prompt(9, seed=3), user_key=user)
    await evaluator.evaluate(tree, np.arange(1), SELECTION)
    return tree


async def second_pass(evaluator: TreeEvaluator, tree: TreeSession) -> None:
    await evaluator.evaluate(tree, np.arange(1, 4), SELECTION)
    evaluator.end(tree)


def assert_no_keys_and_values(made: Counts) -> None:
    """Tokens and slots, then trie nodes come in, and the chosen children go out."""
    assert (len(made.to_device), len(made.to_host)) == (2, 1)
    assert made.synchronisations == {"cudaStreamSynchronize": 1}


@pytest.fixture(autouse=True)
def zeros_found() -> Iterator[None]:
    """Selections of zeros: what no kernel has written is what the memory held before."""
    real = DeviceSelection.evaluations

    def evaluations(selection: DeviceSelection, rows: Sequence[RowSelection], found: Selected) -> Any:
        zeros = {one.name: np.zeros_like(getattr(found, one.name)) for one in fields(Selected)}
        return real(selection, rows, Selected(**zeros))

    with patch.object(DeviceSelection, "evaluations", evaluations):
        yield


async def test_keys_and_values_move_only_after_the_answer_of_a_cold_prompt(models: Models) -> None:
    evaluator = models.evaluator("target", memory_blocks=100, tier=DictStore())
    assert isinstance(evaluator.open_kv, DeviceMemory)
    for _ in range(2):  # shapes that are new: their buffers are made
        await second_pass(evaluator, await first_pass(evaluator, models, OTHER))
        await evaluator.open_kv.close()

    with counted() as cold:
        tree = await first_pass(evaluator, models, USER)
    with counted() as behind:
        await evaluator.open_kv.close()
    await second_pass(evaluator, tree)
    with counted() as hit:
        again = await first_pass(evaluator, models, USER)
    with counted() as below:
        await second_pass(evaluator, again)
        await evaluator.open_kv.close()

    kept = len(models.prompt(9, seed=3)) // BLOCK_TOKENS * BLOCK_TOKENS
    assert tree.passes[0].stats.cached_tokens == 0
    assert again.passes[0].stats.cached_tokens_by_tier["device"] >= kept - BLOCK_TOKENS
    for made in (cold, hit, below):
        assert_no_keys_and_values(made)
    assert sum(copy.bytes for copy in behind.to_host) == kept * models.token_bytes
    await evaluator.close()
