"""Serves several versions of one model in a process.

These are the versions of the bundles on the release tracks, and replaced versions until they have been unused for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Generic, TypeVar

import structlog

from atspeed.concurrency.refcount import RefCount
from atspeed.concurrency.tasks import background_task
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import ModelEntry, Role
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder, ModelDecoder
from atspeed.engine.model.loading import check_decoder, load_decoder, load_device_decoder
from atspeed.engine.model.token_tree import path_depth
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.search.trie import Trie
from atspeed.errors import FailedPreconditionError
from atspeed.model_host.instrumented_evaluator import InstrumentedEvaluator
from atspeed.model_host.loaded_model import KvTiers, LoadedModel, WeightsKey, weights_key
from atspeed.model_host.model_metrics import ModelMetrics, served_reads
from atspeed.model_host.settings import ModelSettings
from atspeed.observability.bundle_metrics import bundle_reads
from atspeed.observability.metrics import Readings, Reads
from atspeed.rollout.bundle_opening import bundle_sources, open_first
from atspeed.rollout.bundle_watch import bundle_watches, watch_bundles
from atspeed.rollout.release_track import Track
from atspeed.rpc import wire
from atspeed.rpc.health import NOTICE_SECONDS
from atspeed.rpc.versions import Versions
from atspeed.v1 import types_pb2

# Pause between two searches for unused versions. Releasing memory a second late is harmless.
_MAX_PAUSE_SECONDS = 1.0

Worker = TypeVar("Worker")
MakeWorker = Callable[[TreeEvaluator, CostCurve], Worker]
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(eq=False)
class HostedModel(Generic[Worker]):
    """A model that is ready to serve.

    Attributes:
        entry: the model's entry in the bundle's manifest.
        weights: its weights, shared with other versions.
        evaluator: evaluates its token trees.
        worker: answers the service's calls.
        info: the answer of GetModelInfo.
        reads: readings for metrics.
        refcount: the running calls.
    """

    entry: ModelEntry
    weights: LoadedModel
    evaluator: InstrumentedEvaluator
    worker: Worker
    info: types_pb2.ModelInfo
    reads: Reads
    refcount: RefCount = field(default_factory=RefCount)

    @property
    def version(self) -> str:
        """Return the model version."""
        return self.info.model_version

    @contextmanager
    def in_use(self) -> Iterator[HostedModel[Worker]]:
        """Keep the model loaded for the length of a call."""
        with self.refcount.held():
            yield self


class HostedModels(Generic[Worker]):
    """Serves one role's model of the bundle on each track, and a replaced version for a while.

    Files are read in a worker thread. All else is for the event loop.

    Args:
        make_worker: makes a worker from an evaluator and its cost curve, in a worker thread.

    Attributes:
        metrics: metrics over all versions.
        versions: versions that health publishes.
    """

    def __init__(self, settings: ModelSettings, role: Role, make_worker: MakeWorker[Worker]) -> None:
        self._settings = settings
        self._role = role
        self._make_worker = make_worker
        self._tiers = KvTiers(settings)
        self.metrics = ModelMetrics(self._tiers.memory)
        self.versions = Versions()
        self._on_track: dict[Track, HostedModel[Worker]] = {}
        self._models: list[HostedModel[Worker]] = []
        self._loading = asyncio.Lock()

    @property
    def stable(self) -> HostedModel[Worker]:
        """Return the stable bundle's model."""
        return self._on_track[Track.STABLE]

    def find(self, version: str, field: str) -> HostedModel[Worker]:
        """Return the model of a version. Raises FailedPreconditionError naming the request's field."""
        for model in reversed(self._models):
            if model.version == version:
                return model
        served = ", ".join(sorted({model.version for model in self._models}))
        raise FailedPreconditionError(f"{field}: this replica serves {served}")

    async def activate(self, bundle: Bundle, track: Track = Track.STABLE) -> None:
        """Serve a bundle's model on a track. A loaded model is not loaded again.

        Raises BundleError or CatalogueError for a bundle whose parts do not match.
        """
        version, entry = bundle.manifest.model_version(self._role), bundle.model(self._role)
        async with self._loading:  # one at a time, as both tracks may name the same bundle
            known = [model for model in self._models if model.version == version and model.entry == entry]
            model = known[0] if known else await self._load(bundle)
            if not known:
                self._models.append(model)
            with model.in_use():
                await self.versions.serve(version)
                self._on_track[track] = model

    def deactivate(self, track: Track) -> None:
        """Stop serving a track. Its version is released after it has been unused for a while."""
        del self._on_track[track]

    @asynccontextmanager
    async def housekeeping(self) -> AsyncIterator[None]:
        """Release unused versions for the length of the block."""
        async with background_task(self._release_unused(), "release-versions"):
            yield

    async def close(self) -> None:
        """Release all versions."""
        for model in list(self._models):
            await self._close(model)
        await self._tiers.close()

    async def _release_unused(self) -> None:
        keep = self._settings.keep_version_seconds
        while True:
            await asyncio.sleep(min(_MAX_PAUSE_SECONDS, max(keep, 0.01)))
            await self._retire_unused(keep)

    async def _retire_unused(self, keep: float) -> None:
        """Retire the models of no track that were unused for so many seconds.

        A function of its own: a variable that outlived it would keep the last model, with its weights, in memory.
        """
        for model in [old for old in self._models if not self._is_current(old) and old.refcount.unused_for(keep)]:
            await self._retire(model)

    async def _retire(self, model: HostedModel[Worker]) -> None:
        """Release a model after callers have been notified. A call in the meantime keeps it.

        Callers are not notified if another model has the same version.
        """
        if not any(other.version == model.version for other in self._models if other is not model):
            await self.versions.withdraw(model.version)
            await asyncio.sleep(NOTICE_SECONDS)
        if self._is_current(model):
            await self.versions.serve(model.version)
        elif model.refcount.unused_for(min(NOTICE_SECONDS, self._settings.keep_version_seconds)):
            await self._close(model)
            _log.info("model_version_released", model_version=model.version)

    def _is_current(self, model: HostedModel[Worker]) -> bool:
        return any(current is model for current in self._on_track.values())

    async def _close(self, model: HostedModel[Worker]) -> None:
        self._models.remove(model)
        self.metrics.remove(model.reads)
        await model.evaluator.close()
        await model.weights.release(self.metrics)

    async def _load(self, bundle: Bundle) -> HostedModel[Worker]:
        """Load a model while others are served. Weights that are loaded already are shared."""
        decoders = {model.weights.key: model.weights.decoder for model in self._models}
        trie, item_codes, decoder = await asyncio.to_thread(self._read, bundle, decoders)
        entry = bundle.model(self._role)
        async with AsyncExitStack() as undo:
            prompt_tokens, key = entry.prompt.max_tokens(item_codes), weights_key(self._settings, entry, item_codes)
            weights = await self._weights(key, decoder, prompt_tokens)
            undo.push_async_callback(weights.release, self.metrics)
            evaluator = self._evaluator(bundle, trie, weights)
            undo.push_async_callback(evaluator.close)
            await asyncio.to_thread(_capture, decoder, trie, entry, self._settings.most_trees)
            await evaluator.warm_up()
            curve = await self._cost_curve(evaluator, weights)
            worker = await asyncio.to_thread(self._make_worker, evaluator, curve)
            await self._check_plan_invariance(evaluator)
            info = self._info(bundle, curve, evaluator)
            await evaluator.probe_at_start()
            undo.pop_all()
        reads = served_reads(info)
        self.metrics.add(reads)
        return HostedModel(evaluator.entry, weights, evaluator, worker, info, reads)

    def _read(self, bundle: Bundle, decoders: Mapping[WeightsKey, ModelDecoder]) -> tuple[Trie, int, ModelDecoder]:
        """Return the trie, the codes of the longest item in a prompt, and the decoder: one of `decoders` if it is there."""
        settings, role = self._settings, self._role
        if settings.verify_bundle:
            bundle.verify(but=role)
        catalogue = bundle.catalogue()  # a model needs no items, so the catalogue itself is freed
        trie, item_codes = catalogue.trie, catalogue.longest_spelling
        key = weights_key(settings, bundle.model(role), item_codes)
        options = RuntimeOptions(provider=settings.provider, intra_op_threads=settings.threads)
        if key not in decoders:
            return trie, item_codes, self._decoder(bundle, options, key.layout.block_tokens)
        if settings.verify_bundle:
            bundle.verify_model(role)
        check_decoder(bundle, role, decoders[key])
        return trie, item_codes, decoders[key]

    def _decoder(self, bundle: Bundle, options: RuntimeOptions, page_tokens: int) -> ModelDecoder:
        """Load the weights with the host's graph, or with the device's and the pools of its keys and values."""
        settings, role, verified = self._settings, self._role, self._settings.verify_bundle
        if not settings.paged:
            return load_decoder(bundle, role, options, verified=verified)
        size = None if settings.kv_device_mb is None else settings.kv_device_mb * 2**20
        return load_device_decoder(bundle, role, options, page_tokens=page_tokens, pool_bytes=size, verified=verified)

    async def _weights(self, key: WeightsKey, decoder: ModelDecoder, prompt_tokens: int) -> LoadedModel:
        """Return the loaded weights with one more reference, or new ones."""
        for model in self._models:
            if model.weights.key == key:
                model.weights.refcount.acquire()
                return model.weights
        weights = await self._tiers.host(key, decoder, prompt_tokens, self.metrics)
        weights.refcount.acquire()
        return weights

    def _evaluator(self, bundle: Bundle, trie: Trie, weights: LoadedModel) -> InstrumentedEvaluator:
        return InstrumentedEvaluator(
            weights.decoder,
            bundle.model(self._role),
            trie,
            bundle.manifest.scoring_rule,
            weights.key.layout,
            weights.cache,
            self.metrics,
            limits=self._settings.batch_limits(weights.key.layout),
            open_kv_bytes=self._settings.kv_open_mb * 2**20,
            unhealthy_after=self._settings.unhealthy_after or None,
            on_health_change=partial(self.versions.set_healthy, bundle.manifest.model_version(self._role)),
        )

    async def _check_plan_invariance(self, evaluator: InstrumentedEvaluator) -> None:
        """Check that scores do not depend on the other tokens of a pass, if the bundle says so. Drafts need not keep that."""
        if self._role == "target" and evaluator.plan_invariant:
            moved = await evaluator.check_plan_invariance()
            log = _log.info if moved.none else _log.error
            log("plan_invariance_checked", holds=moved.none, **asdict(moved))

    async def _cost_curve(self, evaluator: TreeEvaluator, weights: LoadedModel) -> CostCurve:
        """Return the cost curve of the weights. Versions that share them measure it once."""
        if weights.cost_curve is None:
            weights.cost_curve = await evaluator.cost_curve(self._settings.warm_up_seconds)
            if self._settings.kv_redis == "measured":
                weights.cache.set_recompute_cost(weights.cost_curve.saved)
        return weights.cost_curve

    def _info(self, bundle: Bundle, cost_curve: CostCurve, evaluator: TreeEvaluator) -> types_pb2.ModelInfo:
        manifest, entry, settings = bundle.manifest, bundle.model(self._role), self._settings
        return types_pb2.ModelInfo(
            model_version=manifest.model_version(self._role),
            catalogue_version=manifest.catalogue_version,
            bundle_name=manifest.name,
            scoring_rule=wire.to_scoring_rule(manifest.scoring_rule),
            architecture=entry.architecture,
            precision=entry.precision,
            parameters=entry.parameters,
            max_positions=entry.max_positions,
            max_nodes=settings.max_nodes,
            provider=settings.provider,
            cost_curve=wire.to_cost_curve(cost_curve),
            plan_invariant=evaluator.plan_invariant,
        )


def _capture(decoder: ModelDecoder, trie: Trie, entry: ModelEntry, trees: int) -> None:
    """Capture the CUDA graphs of a model on a GPU, for the depth of a trie and up to so many trees in a pass."""
    if isinstance(decoder, DeviceDecoder):
        decoder.capture(path_depth(trie), entry.max_positions, trees)


@asynccontextmanager
async def served_models(
    settings: ModelSettings, role: Role, make_worker: MakeWorker[Worker]
) -> AsyncIterator[HostedModels[Worker]]:
    """Serve a role's model of the settings' bundles, with hot reload. The stable one is warmed up when the block begins.

    Raises BundleError or CatalogueError for a stable bundle whose parts do not match.
    """
    sources = bundle_sources(settings)
    bundle = await open_first(sources[Track.STABLE])
    models = HostedModels(settings, role, make_worker)
    watches = bundle_watches(sources, models, bundle.manifest.version)
    models.metrics.registry.register(Readings(bundle_reads(watches)))
    try:
        await models.activate(bundle)
        async with models.housekeeping(), watch_bundles(watches, settings.bundle_poll_seconds):
            yield models
    finally:
        await models.close()
