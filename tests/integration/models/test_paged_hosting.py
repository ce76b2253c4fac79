"""A model service with keys and values in pages: what it refuses at its start, and what versions of a model share."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import generate_latest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.engine.bundle.manifest import DeviceGraphEntry, write_manifest
from atspeed.engine.errors import BundleError
from atspeed.engine.kv.memory_cache import KvLayout
from atspeed.engine.model.device_decoder import DeviceDecoder
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.trie import ROOT, Pruning
from atspeed.model_host.hosted_models import HostedModel, HostedModels, served_models
from atspeed.model_host.settings import ModelSettings
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.serving import LIVENESS_SECONDS


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle"), random_catalogue(20, (4, 4), seed=0)).bundle


@pytest.fixture
def root(bundle: Bundle, tmp_path: Path) -> Path:
    """The same models and catalogue, with a manifest that a test may change."""
    for folder in ("target", "draft", "catalogue"):
        (tmp_path / folder).symlink_to(bundle.root / folder)
    write_manifest(tmp_path, bundle.manifest)
    return tmp_path


@asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[HostedModels[TreeEvaluator]]:
    """The target of a bundle, in pages."""
    paged: dict[str, Any] = {
        "verify_bundle": False,
        "warm_up_seconds": 0,
        "kv_paged": "always",
        "kv_device_mb": 4,
    } | settings
    async with served_models(ModelSettings(**paged), "target", lambda model, _: model) as models:
        yield models


async def cached_tokens(model: HostedModel[TreeEvaluator]) -> Mapping[str, int]:
    """Tokens that a first pass over a prompt of three items finds, by tier."""
    entry = model.entry
    prompt = entry.prompt.tokens([np.array(entry.code_tokens[:1] + entry.code_tokens[4:5])] * 3)
    tree = await model.evaluator.open(prompt)
    try:
        _, cost = await model.evaluator.evaluate(tree, np.array([ROOT]), Selection(Pruning.none(), limit=4))
    finally:
        model.evaluator.end(tree)
    return cost.cached_tokens_by_tier


@pytest.mark.parametrize(
    ("claimed", "problem"),
    [
        ({"device_graph": None}, r"target\.device_graph: the bundle has none; export the model again, or set kv_paged"),
        ({"device_graph": None, "precision": "int8"}, r"target\.device_graph: .* a int8 llama runs with kv_paged never"),
        ({"precision": "bfloat16"}, r"target\.precision: bfloat16 in pages is for a GPU; set kv_paged to never"),
        ({"precision": "float16"}, r"target\.precision: float16, but target/\S+ has float32"),
        ({"device_graph": DeviceGraphEntry(path="target/device.onnx", head="codes")}, r"target\.device_graph\.head: codes"),
    ],
)  # fmt: skip
async def test_what_cannot_run_in_pages_is_refused_in_one_line(
    root: Path, claimed: dict[str, Any], problem: str
) -> None:
    manifest = Bundle(root).manifest
    write_manifest(root, manifest.model_copy(update={"target": manifest.target.model_copy(update=claimed)}))
    with pytest.raises(BundleError, match=problem) as refusal:
        async with served(bundle=root):
            pass
    assert "\n" not in str(refusal.value)


async def test_a_bundle_without_a_device_graph_is_served_on_the_host(root: Path) -> None:
    """By default, on a CPU; and the other way round a bundle with one is."""
    manifest = Bundle(root).manifest
    async with served(bundle=root, kv_paged="auto") as models:
        assert not isinstance(models.stable.evaluator.decoder, DeviceDecoder)
    target = manifest.target.model_copy(update={"device_graph": None})
    write_manifest(root, manifest.model_copy(update={"target": target}))
    async with served(bundle=root, kv_paged="auto") as models:
        assert not isinstance(models.stable.evaluator.decoder, DeviceDecoder)
        assert set(await cached_tokens(models.stable)) == {"memory"}


async def test_a_new_catalogue_shares_the_pages_and_their_prefixes(bundle: Bundle, root: Path, tmp_path: Path) -> None:
    other = update_catalogue(bundle, tmp_path / "other", {"new": (1, 2)}, ["item-3"])
    async with served(bundle=root) as models:
        old = models.stable
        assert (await cached_tokens(old))["device"] == 0
        await models.activate(other)
        assert models.stable.evaluator.decoder is old.evaluator.decoder
        assert (await cached_tokens(models.stable))["device"] > 0
        assert (await cached_tokens(old))["device"] > 0
        metrics = generate_latest(models.metrics.registry).decode()
    assert 'atspeed_kv_block_lookups_total{result="hit",tier="device"}' in metrics
    held = next(line for line in metrics.splitlines() if line.startswith("atspeed_kv_device_bytes "))
    assert float(held.split()[1]) > 0


async def test_new_weights_have_pages_of_their_own_and_the_old_ones_are_freed(root: Path, tmp_path: Path) -> None:
    """Running requests keep the old ones until they have ended."""
    other = write_bundle(tmp_path / "other", random_catalogue(20, (4, 4), seed=0), seed=3).bundle
    async with served(bundle=root, keep_version_seconds=0.2) as models:
        old = models.stable
        await cached_tokens(old)
        with old.in_use():
            await models.activate(other)
            assert (await cached_tokens(models.stable))["device"] == 0
            assert (await cached_tokens(old))["device"] > 0
        decoder = old.evaluator.decoder
        assert isinstance(decoder, DeviceDecoder)
        gone = weakref.ref(decoder)
        version = old.version
        del old, decoder
        async with asyncio.timeout(LIVENESS_SECONDS):
            while version in models.versions.served or gone() is not None:
                await asyncio.sleep(0.01)
                gc.collect()
        assert (await cached_tokens(models.stable))["device"] > 0


def test_defaults_follow_the_place_of_keys_and_values() -> None:
    """On a GPU batches are large, and trees of any lengths share one; what is set stays."""
    layout = KvLayout(layers=4, kv_heads=2, head_dim=8, dtype="float16", block_tokens=4)
    bundle = Path(__file__).parent
    host, gpu = ModelSettings(bundle=bundle), ModelSettings(bundle=bundle, provider="cuda")
    unpaged = ModelSettings(bundle=bundle, provider="cuda", kv_paged="never")
    assert (host.paged, gpu.paged, unpaged.paged) == (False, True, False)
    found = [settings.batch_limits(layout) for settings in (host, gpu)]
    assert [(limits.requests, limits.tokens) for limits in found] == [(16, 32), (64, 512)]
    assert found[1].gathered_tokens == layout.layers * found[0].gathered_tokens
    assert (found[0].cached_padding, found[1].cached_padding) == (1.5, float("inf"))
    chosen = ModelSettings(bundle=bundle, provider="cuda", batch_requests=3, batch_tokens=7)
    assert (chosen.batch_limits(layout).requests, chosen.batch_limits(layout).tokens) == (3, 7)
