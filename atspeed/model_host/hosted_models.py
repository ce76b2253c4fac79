"""The versions of one model that a process serves, side by side: those of the bundles on its tracks, and those that these no
longer have until nobody has asked for them for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import structlog

from atspeed.concurrency.tasks import background_task
from atspeed.engine.bundle.manifest import Bundle, ModelEntry, Role
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.decoder import Decoder, RuntimeOptions, check_decoder, load_decoder
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.search.trie import Trie
from atspeed.errors import FailedPreconditionError
from atspeed.model_host.instrumented_evaluator import InstrumentedEvaluator
from atspeed.model_host.loaded_model import KvTiers, LoadedModel, WeightsKey, weights_key
from atspeed.model_host.model_metrics import ModelMetrics, served_reads
from atspeed.model_host.settings import ModelSettings
from atspeed.observability.bundle_metrics import bundle_reads
from atspeed.observability.metrics import Readings, Reads
from atspeed.rollout.bundle_watch import bundle_watches, following, open_bundle
from atspeed.rollout.release_track import Track
from atspeed.rpc import wire
from atspeed.rpc.health import NOTICE_SECONDS
from atspeed.rpc.versions import Versions
from atspeed.v1 import types_pb2

_LONGEST_PAUSE_SECONDS = 1.0

Worker = TypeVar("Worker")
MakeWorker = Callable[[TreeEvaluator, CostCurve], Worker]
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(eq=False)
class HostedModel(Generic[Worker]):
    """A model that is ready to serve. worker: what answers calls with it. info: what GetModelInfo answers.

    calls: how many use it now. used_at: when the last one ended.
    """

    entry: ModelEntry
    weights: LoadedModel
    evaluator: InstrumentedEvaluator
    worker: Worker
    info: types_pb2.ModelInfo
    reads: Reads
    calls: int = 0
    used_at: float = field(default_factory=time.monotonic)

    @property
    def version(self) -> str:
        """Its model version."""
        return self.info.model_version

    @contextmanager
    def in_use(self) -> Iterator[HostedModel[Worker]]:
        """For the time of a call: it is not let go of."""
        self.calls += 1
        try:
            yield self
        finally:
            self.calls -= 1
            self.used_at = time.monotonic()

    def idle_for(self, seconds: float) -> bool:
        """Whether nobody has used it for so long."""
        return not self.calls and time.monotonic() - self.used_at >= seconds


class HostedModels(Generic[Worker]):
    """Serves one role's model of the bundle on each track and, after `activate` of another one, both for a while.

    make_worker: of an evaluator and what its passes cost; runs in a worker thread. metrics: of all versions together. versions:
    those that health knows.
    Everything but loading is for the event loop.
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
        """The stable bundle's model."""
        return self._on_track[Track.STABLE]

    def find(self, version: str, field: str) -> HostedModel[Worker]:
        """The model of a version. Raises FailedPreconditionError, naming the request's field, when there is none."""
        for model in reversed(self._models):
            if model.version == version:
                return model
        served = ", ".join(sorted({model.version for model in self._models}))
        raise FailedPreconditionError(f"{field}: this replica serves {served}")

    async def activate(self, bundle: Bundle, track: Track = Track.STABLE) -> None:
        """Serve a bundle's model on a track, from the return on. What is loaded already is not loaded again.

        Raises BundleError or CatalogueError when the bundle's parts do not fit together.
        """
        version, entry = bundle.manifest.model_version(self._role), bundle.model(self._role)
        async with self._loading:  # one at a time: both tracks may come to the same bundle
            known = [model for model in self._models if model.version == version and model.entry == entry]
            model = known[0] if known else await self._load(bundle)
            if not known:
                self._models.append(model)
            with model.in_use():
                await self.versions.serve(version)
                self._on_track[track] = model

    def deactivate(self, track: Track) -> None:
        """Serve none on a track: its version is let go of when nobody has asked for it for a while."""
        del self._on_track[track]

    @asynccontextmanager
    async def housekeeping(self) -> AsyncIterator[None]:
        """For as long as the block lasts, versions that nobody needs any more are let go of."""
        async with background_task(self._let_go_of_old(), "old-versions"):
            yield

    async def close(self) -> None:
        """Let go of everything."""
        for model in list(self._models):
            await self._close(model)
        await self._tiers.close()

    async def _let_go_of_old(self) -> None:
        keep = self._settings.keep_version_seconds
        while True:
            await asyncio.sleep(min(_LONGEST_PAUSE_SECONDS, max(keep, 0.01)))
            for model in [old for old in self._models if not self._is_current(old) and old.idle_for(keep)]:
                await self._retire(model)

    async def _retire(self, model: HostedModel[Worker]) -> None:
        """Callers hear of it first; one that calls all the same keeps it. Of a version that another model has, nobody hears."""
        if not any(other.version == model.version for other in self._models if other is not model):
            await self.versions.withdraw(model.version)
            await asyncio.sleep(NOTICE_SECONDS)
        if self._is_current(model):
            await self.versions.serve(model.version)
        elif model.idle_for(min(NOTICE_SECONDS, self._settings.keep_version_seconds)):
            await self._close(model)
            _log.info("a version is no longer served", model_version=model.version)

    def _is_current(self, model: HostedModel[Worker]) -> bool:
        return any(current is model for current in self._on_track.values())

    async def _close(self, model: HostedModel[Worker]) -> None:
        self._models.remove(model)
        self.metrics.remove(model.reads)
        await model.evaluator.close()
        await model.weights.release(self.metrics)

    async def _load(self, bundle: Bundle) -> HostedModel[Worker]:
        """Beside what is served: files are read in a worker thread, and weights that are here already are shared."""
        here = {model.weights.key: model.weights for model in self._models}
        trie, key, decoder = await asyncio.to_thread(self._read, bundle, {key: here[key].decoder for key in here})
        async with AsyncExitStack() as undo:
            prompt_tokens = bundle.model(self._role).prompt.max_tokens(trie.levels)
            weights = await self._weights(key, decoder, prompt_tokens)
            undo.push_async_callback(weights.release, self.metrics)
            evaluator = self._evaluator(bundle, trie, weights)
            undo.push_async_callback(evaluator.close)
            await evaluator.warm_up()
            curve = await self._cost_curve(evaluator, weights)
            worker = await asyncio.to_thread(self._make_worker, evaluator, curve)
            info = self._info(bundle, curve)
            await evaluator.examine()
            undo.pop_all()
        reads = served_reads(info)
        self.metrics.add(reads)
        return HostedModel(evaluator.entry, weights, evaluator, worker, info, reads)

    def _read(self, bundle: Bundle, decoders: Mapping[WeightsKey, Decoder]) -> tuple[Trie, WeightsKey, Decoder]:
        settings, role = self._settings, self._role
        if settings.verify_bundle:
            bundle.verify(but=role)
        trie = bundle.catalogue().trie  # a model needs no item: those are let go of
        key = weights_key(settings, bundle.model(role), trie.levels)
        options = RuntimeOptions(provider=settings.provider, intra_op_threads=settings.threads)
        if key not in decoders:
            return trie, key, load_decoder(bundle, role, options, verified=settings.verify_bundle)
        if settings.verify_bundle:
            bundle.verify_model(role)
        check_decoder(bundle, role, decoders[key])
        return trie, key, decoders[key]

    async def _weights(self, key: WeightsKey, decoder: Decoder, prompt_tokens: int) -> LoadedModel:
        """Those that are here, with one user more, or new ones."""
        for model in self._models:
            if model.weights.key == key:
                model.weights.users += 1
                return model.weights
        weights = await self._tiers.weights(key, decoder, prompt_tokens, self.metrics)
        weights.users = 1
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
            unhealthy_after=self._settings.unhealthy_after,
            declare_fit=partial(self.versions.declare_fit, bundle.manifest.model_version(self._role)),
        )

    async def _cost_curve(self, evaluator: TreeEvaluator, weights: LoadedModel) -> CostCurve:
        """What a pass costs. It is the weights' own, so versions that share them measure it once."""
        if weights.cost_curve is None:
            weights.cost_curve = await evaluator.cost_curve(self._settings.warm_up_seconds)
            if self._settings.kv_redis == "measured":
                weights.cache.fetching.recompute_ns = weights.cost_curve.saved
        return weights.cost_curve

    def _info(self, bundle: Bundle, cost_curve: CostCurve) -> types_pb2.ModelInfo:
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
        )


@asynccontextmanager
async def served_models(
    settings: ModelSettings, role: Role, make_worker: MakeWorker[Worker]
) -> AsyncIterator[HostedModels[Worker]]:
    """The stable bundle's model of a role, warmed up, and from then on those of the bundles that the settings' paths name.

    Raises BundleError or CatalogueError when the parts of the first do not fit together.
    """
    bundle = open_bundle(settings.bundle)
    models = HostedModels(settings, role, make_worker)
    watches = bundle_watches(settings, models, bundle.manifest.version)
    models.metrics.registry.register(Readings(bundle_reads(watches)))
    try:
        await models.activate(bundle)
        async with models.housekeeping(), following(watches, settings.bundle_poll_seconds):
            yield models
    finally:
        await models.close()
