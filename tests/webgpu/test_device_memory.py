"""Whole searches with keys and values in pages of a device whose memory is not the host's: the CPU's lists."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.model import device_decoder, device_pass, device_pools, device_selector, staged_inputs
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder
from atspeed.engine.model.device_stream import DeviceStream
from atspeed.engine.model.onnx_bytes import ELEMENT_TYPES
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.trie import Pruning
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import Strict
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import Models, ModelTarget
from tests.webgpu import software_device
from tests.webgpu.software_device import missing

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing())]

K = 5


class SeparateInputs:
    """`StagedInputs` in a tensor each: this provider takes no address within a buffer.

    Inputs that a node on the host reads are copied there when they are bound, so they are bound after each change.
    """

    def __init__(self, binding: onnxruntime.IOBinding, axes: staged_inputs.Axes, device: str, _: DeviceStream) -> None:
        self.arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in axes.items()}
        self._values = {name: _allocate(shape, dtype, device) for name, (dtype, shape) in axes.items()}
        self._binding = binding

    def copy(self) -> None:
        """Copy the arrays to the device."""
        for name, value in self._values.items():
            value.update_inplace(self.arrays[name])
            self._binding.bind_ortvalue_input(name, value)


def _allocate(shape: Any, dtype: str, _: str) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), ELEMENT_TYPES[dtype], "webgpu", 0)


def _open_session(
    files: ModelFiles, options: RuntimeOptions, _: Mapping[str, str] | None = None
) -> onnxruntime.InferenceSession:
    return software_device._open_session(files, options)


@pytest.fixture
def device() -> Iterator[None]:
    """Pools, inputs and sessions on the software device. Children are selected on the host."""
    with ExitStack() as patches:
        for module in (device_decoder, device_pools):
            patches.enter_context(patch.object(module, "open_session", _open_session))
        for module in (device_pools, device_pass):
            patches.enter_context(patch.object(module, "allocate", _allocate))
        patches.enter_context(patch.object(device_pass, "StagedInputs", SeparateInputs))
        patches.enter_context(patch.object(device_selector.DeviceSelector, "can_select", lambda *_: False))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), random_catalogue(20, (4, 4, 3), seed=2)))


async def scores_of(models: Models, evaluator: TreeEvaluator, prompt: Int64) -> Mapping[int, float]:
    """The leaves of a plain beam search, with their scores, in order."""
    selection = Selection(Pruning.none(), limit=K)
    target, trie = ModelTarget(evaluator, prompt, selection), models.catalogue.trie
    found = await beam_search(trie, models.rule, Strict(BeamWidths.of(K)), target, NoDraft())
    assert target.tree is not None
    evaluator.end(target.tree)
    return dict(zip(found.leaves.node.tolist(), found.leaves.score.tolist(), strict=True))


async def searches(models: Models, evaluator: TreeEvaluator) -> list[Mapping[int, float]]:
    """A cold prompt, the same one, a longer one that begins with it, and two at once."""
    prompts = [models.prompt(items, seed=3) for items in (3, 3, 5)]
    found = [await scores_of(models, evaluator, prompt) for prompt in prompts]
    both = (models.prompt(2, seed=4), models.prompt(6, seed=5))
    found += await asyncio.gather(*(scores_of(models, evaluator, prompt) for prompt in both))
    await evaluator.close()
    return found


async def test_lists_are_those_of_the_cpu(models: Models, device: None) -> None:
    expected = await searches(models, models.evaluator("target"))
    paged = Models(models.bundle, models.catalogue, models.naive, models.decoders, paged=True)
    evaluator = paged.evaluator("target")
    found = await searches(models, evaluator)
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours) == list(theirs)
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-4)
    assert isinstance(evaluator.decoder, DeviceDecoder)
    assert evaluator.decoder.pages.statistics.hits > 0
    # What a page holds comes back as it is, and is gone after it was overwritten.
    pages = list(evaluator.decoder.pages._page_of.values())
    blocks = evaluator.decoder.read_pages(pages)
    assert all(np.any(block) for block in blocks)
    evaluator.decoder.write_pages(pages, blocks[::-1])
    np.testing.assert_array_equal(evaluator.decoder.read_pages(pages), blocks[::-1])
    evaluator.decoder._zero(pages)
    assert not np.any(evaluator.decoder.read_pages(pages))
