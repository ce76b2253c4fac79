"""A service starts on a bundle whose parts fit together, and on no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import generate_latest
from pydantic import ValidationError

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.engine.bundle.manifest import write_manifest
from atspeed.engine.errors import BundleError
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.trie import Pruning
from atspeed.errors import FailedPreconditionError
from atspeed.model_host.hosted_models import HostedModel, HostedModels, served_models
from atspeed.model_host.settings import ModelSettings
from atspeed.rollout.release_track import Track
from atspeed.rpc import wire
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


def claim(root: Path, **fields: Any) -> None:
    """Change the manifest's entry of the target."""
    manifest = Bundle(root).manifest
    write_manifest(root, manifest.model_copy(update={"target": manifest.target.model_copy(update=fields)}))


@asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[HostedModels[TreeEvaluator]]:
    """The target of a bundle."""
    async with served_models(
        ModelSettings(verify_bundle=False, **settings), "target", lambda model, _: model
    ) as models:
        yield models


def measured(model: HostedModel[TreeEvaluator]) -> CostCurve:
    """Return the cost curve of its passes."""
    assert model.weights.cost_curve is not None
    return model.weights.cost_curve


async def test_matching_bundle_is_served(root: Path) -> None:
    async with served(bundle=root) as models:
        model = models.stable
        assert (model.info.precision, model.info.max_positions) == ("float32", 256)


async def test_cost_curve_is_measured_and_published(root: Path) -> None:
    """Prompts of this bundle have up to 17 tokens or so, its cached blocks as many as an item."""
    async with served(bundle=root, warm_up_seconds=0) as models:
        model = models.stable
        curve = wire.cost_curve(model.info.cost_curve, "cost_curve")
        assert (curve.new_tokens.tolist(), curve.cached_tokens.tolist()) == ([1, 64], [0, 8, 16])
        np.testing.assert_allclose(curve.forward_ns, measured(model).forward_ns, rtol=1e-12)  # smoothed once more


async def test_no_pass_of_the_measurement_is_longer_than_the_model(root: Path) -> None:
    """A prompt and its codes take up to 19 positions here, and the trie has few nodes to fill a pass with."""
    claim(root, max_positions=19)
    async with served(bundle=root) as models:
        assert measured(models.stable).new_tokens.tolist() == [1, 4]


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("layers", 3, "3, but target/model.onnx has 2"),
        ("kv_heads", 4, "4, but target/model.onnx has 2"),
        ("head_dim", 24, "24, but target/model.onnx has 12"),
        ("precision", "float16", "float16, but target/model.onnx has float32"),
        ("max_positions", 18, "18, but prompt and codes take up to 19"),
        ("code_tokens", (3, 4, 5), "3 tokens for 8 code columns"),
    ],
)
async def test_manifest_that_contradicts_a_model_is_refused(
    root: Path, field: str, value: object, problem: str
) -> None:
    claim(root, **{field: value})
    with pytest.raises(BundleError, match=rf"manifest\.json: target\.{field}: {problem}"):
        async with served(bundle=root):
            pass


async def test_int8_model_is_refused_on_cuda(root: Path) -> None:
    claim(root, precision="int8")
    with pytest.raises(BundleError, match=r"manifest\.json: target\.precision: int8 is for provider cpu, this is cuda"):
        async with served(bundle=root, provider="cuda"):
            pass


async def test_a_model_of_another_catalogue_is_refused(root: Path) -> None:
    """Catalogue and manifest agree on nine code columns, the graph has eight."""
    other = Catalogue.build(["a"], random_catalogue(1, (4, 5), seed=0).codes, (4, 5))
    (root / "catalogue").unlink()
    other.save(root / "catalogue")
    manifest = Bundle(root).manifest
    write_manifest(root, manifest.model_copy(update={"catalogue_version": other.version, "draft": None}))
    claim(root, code_tokens=tuple(range(2, 11)))
    problem = r"target\.code_tokens: 9 code columns, but target/model\.onnx has 8 code columns"
    with pytest.raises(BundleError, match=problem):
        async with served(bundle=root):
            pass


def _serves(models: HostedModels[TreeEvaluator], version: str) -> bool:
    try:
        models.find(version, "field")
    except FailedPreconditionError:
        return False
    return True


async def evaluated(model: HostedModel[TreeEvaluator]) -> PassStats:
    """A first pass over a prompt of three items."""
    entry, trie = model.entry, model.evaluator.trie
    items = [np.array(entry.code_tokens[:1] + entry.code_tokens[4:5])] * 3
    prompt, selection = entry.prompt.tokens(items), Selection(Pruning.none(), limit=4)
    tree = await model.evaluator.open(prompt)
    try:
        _, cost = await model.evaluator.evaluate(tree, np.arange(1, dtype=np.int64), selection)
    finally:
        model.evaluator.end(tree)
    assert trie.levels == 2
    return cost


async def test_new_catalogue_shares_weights_and_prefix_cache(bundle: Bundle, root: Path, tmp_path: Path) -> None:
    """Nothing is loaded twice. The old version is served until it has been unused for a while."""
    other = update_catalogue(bundle, tmp_path / "other", {"new": (1, 2)}, ["item-3"])
    async with served(bundle=root, keep_version_seconds=0.2) as models:
        old = models.stable
        first = await evaluated(old)
        with models.find(old.version, "field").in_use():
            await models.activate(other)
            assert models.stable.weights is old.weights
            assert (
                (await evaluated(models.stable)).cached_tokens_by_tier["memory"]
                > first.cached_tokens_by_tier["memory"]
                == 0
            )
            await evaluated(models.find(old.version, "field"))
            assert models.versions.served == {old.version, models.stable.version}
        async with asyncio.timeout(LIVENESS_SECONDS):
            while _serves(models, old.version):  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
        assert models.versions.served == {models.stable.version}
        with pytest.raises(FailedPreconditionError, match=f"^field: this replica serves {models.stable.version}$"):
            models.find(old.version, "field")
        await evaluated(models.stable)


async def test_previous_weights_are_not_loaded_again(root: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", random_catalogue(20, (4, 4), seed=0), seed=3).bundle
    async with served(bundle=root) as models:
        old = models.stable
        await models.activate(other)
        assert models.stable.weights is not old.weights
        await models.activate(Bundle(root))
        assert models.stable is old


async def test_bad_bundle_changes_nothing(bundle: Bundle, root: Path, tmp_path: Path) -> None:
    other = update_catalogue(bundle, tmp_path / "other", {"new": (1, 2)}, [])
    claim(other.root, layers=3)
    async with served(bundle=root) as models:
        old = models.stable
        with pytest.raises(BundleError, match="layers"):
            await models.activate(Bundle(other.root))
        assert models.stable is old
        assert models.versions.served == {old.version}
        await evaluated(old)


async def test_canary_is_served_until_it_is_deactivated(bundle: Bundle, root: Path, tmp_path: Path) -> None:
    """For much longer than a version is kept that no track has: one that came after it has gone by then."""
    link = tmp_path / "canary-link"
    link.symlink_to(update_catalogue(bundle, tmp_path / "other", {"new": (1, 2)}, []).root)
    third = update_catalogue(bundle, tmp_path / "third", {"newer": (1, 2)}, [])
    changing = {"keep_version_seconds": 0.05, "bundle_poll_seconds": 0.01}
    async with served(bundle=root, canary_bundle=link, **changing) as models, asyncio.timeout(LIVENESS_SECONDS):
        (canary,) = models.versions.served - {models.stable.version}
        assert models.stable.version == bundle.manifest.model_version("target")
        await evaluated(models.find(canary, "field"))
        await models.activate(third)
        await models.activate(bundle)
        while _serves(models, third.manifest.model_version("target")):  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        assert models.versions.served == {models.stable.version, canary}
        link.unlink()
        while _serves(models, canary):  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        assert models.versions.served == {models.stable.version}


async def test_promoted_canary_is_not_loaded_again(bundle: Bundle, root: Path, tmp_path: Path) -> None:
    other = update_catalogue(bundle, tmp_path / "other", {"new": (1, 2)}, [])
    async with served(bundle=root, keep_version_seconds=0.05) as models, asyncio.timeout(LIVENESS_SECONDS):
        old = models.stable.version
        await asyncio.gather(models.activate(other, Track.CANARY), models.activate(other))
        assert models.stable is models.find(other.manifest.model_version("target"), "field")
        models.deactivate(Track.CANARY)
        while _serves(models, old):  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        assert models.versions.served == {models.stable.version}
        await evaluated(models.stable)


async def test_bad_canary_does_not_stop_the_start(root: Path, tmp_path: Path) -> None:
    broken = write_bundle(tmp_path / "broken", random_catalogue(20, (4, 4), seed=0), seed=3).bundle
    claim(broken.root, layers=3)
    async with served(bundle=root, canary_bundle=broken.root) as models:
        assert models.versions.served == {models.stable.version}
        exposed = generate_latest(models.metrics.registry).decode()
    assert 'atspeed_bundle_changes_total{result="refused",track="canary"} 1.0' in exposed
    assert 'atspeed_bundle_served{track="canary"} 0.0' in exposed
    assert 'atspeed_bundle_served{track="stable"} 1.0' in exposed


def test_a_time_to_live_that_redis_would_refuse_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="kv_ttl_seconds"):
        ModelSettings(bundle=tmp_path, kv_ttl_seconds=10**16)
