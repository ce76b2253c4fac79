"""A recommender in this process, without gRPC and Redis, for notebooks and batches.

    with Recommender("bundles/movielens-100k") as recommender:
        print(recommender.recommend(["50", "172", "181"], k=10).item_ids)

The beam loop, the verification policies, the planner and both model hosts are those of the services, so the lists are theirs too.
Histories come with the request: nothing is stored.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
import threading
from collections import deque
from collections.abc import Coroutine, Generator, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import structlog
from pydantic import SecretStr

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Manifest
from atspeed.engine.bundle.prompts import read_items
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.errors import ServiceError, UnimplementedError
from atspeed.local.in_process_models import InProcessDraft, InProcessTarget
from atspeed.model_host.hosted_models import served_models
from atspeed.rollout.bundle_opening import open_bundle
from atspeed.rpc import wire
from atspeed.rpc.grpc_status import call_status
from atspeed.v1 import recommendation_pb2 as pb
from atspeed_client import CallError, ClientStateError, Mode, Recommendation, RecommendRequest
from atspeed_client.errors import status_error
from atspeed_client.reading import to_recommendation
from draft_service.draft_kinds import make_drafter
from draft_service.settings import DraftSettings
from orchestrator.planning.planner import PlanLimits, Planner
from orchestrator.recommend import Recommender as RecommenderOfBundle
from orchestrator.recommendation import Recommendation as RecommendationWithSearch
from orchestrator.replies import to_reply
from orchestrator.requests import parse_request
from orchestrator.speculation_breaker import SpeculationBreaker
from target_service.search_runner import SearchRunner
from target_service.settings import TargetSettings

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RecommenderOptions:
    """Options of a recommender in this process.

    Attributes:
        threads: CPU threads of one pass of the target; the draft has one.
        draft: use the bundle's draft; without it the target alone searches, with prefetched nodes.
        cache_mb: memory for the prefix cache of each model, in MiB.
        warm_up_seconds: longest time for the measurement of each model's cost curve at the start.
        timeout_seconds: longest time of one list.
        plan_limits: settings of the planner.
        max_k: largest k of a request.
        max_beam_width: largest beam width of a request.
        max_candidate_items: most excluded or allowed items of a request.
        max_history_items: most items of a history.
    """

    threads: int = 2
    draft: bool = True
    cache_mb: int = 512
    warm_up_seconds: float = 2.0
    timeout_seconds: float = 60.0
    plan_limits: PlanLimits = field(default_factory=PlanLimits)
    max_k: int = 10_000
    max_beam_width: int = 4_096
    max_candidate_items: int = 10_000_000
    max_history_items: int = 100_000


@dataclass(frozen=True)
class _Served:
    """The loaded bundle. version: of the bundle, computed once."""

    manifest: Manifest
    version: str
    recommender: RecommenderOfBundle


class Recommender:
    """A recommender over a bundle. A context manager; any thread may call it, also one with a running event loop.

    The models run in threads of their own. Raises BundleError or CatalogueError for a bundle that cannot be served, and
    pydantic's ValidationError for an option out of range.

    Args:
        bundle: the folder of the bundle.
        options: the options.
    """

    def __init__(self, bundle: Path | str, options: RecommenderOptions | None = None) -> None:
        self._options = options or RecommenderOptions()
        _quiet_logs()
        self._loop = asyncio.new_event_loop()
        self._resources = AsyncExitStack()
        self._thread = threading.Thread(target=self._loop.run_forever, name="recommender", daemon=True)
        self._thread.start()
        try:
            self._served = self._wait(self._load(Path(bundle)))
        except BaseException:
            self.close()
            raise

    @property
    def catalogue(self) -> Catalogue:
        """Return the bundle's items."""
        return self._served.recommender.catalogue

    @property
    def version(self) -> str:
        """Return the version of the bundle."""
        return self._served.version

    def recommend(
        self,
        history: Iterable[str],
        *,
        k: int = 10,
        beam_width: int = 0,
        beam_widths: Iterable[int] | None = None,
        mode: Mode | str = Mode.STRICT,
        tolerance: float = 0.0,
        temperature: float | None = None,
        seed: int | None = None,
        excluded: Iterable[str] | None = None,
        allowed: Iterable[str] | None = None,
        exclude_seen: bool = False,
        items_per_path: int = 0,
        user_fields: Mapping[str, str] | None = None,
    ) -> Recommendation:
        """Return the list of a history. See `atspeed_client.RecommendRequest` and `send`."""
        request = RecommendRequest(
            history=history,
            k=k,
            beam_width=beam_width,
            beam_widths=beam_widths,
            mode=mode,
            tolerance=tolerance,
            temperature=temperature,
            seed=seed,
            excluded=excluded,
            allowed=allowed,
            exclude_seen=exclude_seen,
            items_per_path=items_per_path,
            user_fields=user_fields,
        )
        return self.send(request)

    def send(self, request: RecommendRequest) -> Recommendation:
        """Return the list of a request.

        Raises CallError with the status of the services when there is no list, and UsageError for a mistake.
        """
        return _answer(self._start(request))

    def diagnose(self, request: RecommendRequest) -> RecommendationWithSearch:
        """Return the list of a request with its search: every node that the target evaluated. Raises as `send`."""
        self._check_open()
        return _answer(asyncio.run_coroutine_threadsafe(self._search(_message(request)), self._loop))

    def recommend_many(
        self, requests: Iterable[RecommendRequest], *, concurrency: int = 16
    ) -> Generator[Recommendation | CallError]:
        """Yield each request's list or its error, in the order of the requests.

        `concurrency` of them run at once and share passes. `requests` is read as far as they are started.
        """
        running: deque[Future[Recommendation]] = deque()
        try:
            for request in requests:
                running.append(self._start(request))
                if len(running) >= concurrency:
                    yield _outcome(running.popleft())
            while running:
                yield _outcome(running.popleft())
        finally:
            for left in running:
                left.cancel()

    def close(self) -> None:
        """Release the models. A second call has no effect."""
        if self._loop.is_closed():
            return
        try:
            self._wait(self._resources.aclose())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, request: RecommendRequest) -> Future[Recommendation]:
        self._check_open()
        return asyncio.run_coroutine_threadsafe(self._recommend(_message(request)), self._loop)

    def _check_open(self) -> None:
        if self._loop.is_closed():
            raise ClientStateError("the recommender is closed; create another one")

    def _wait(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _search(self, request: pb.RecommendRequest) -> RecommendationWithSearch:
        if request.WhichOneof("subject") == "user_id":
            raise UnimplementedError("user_id: this recommender stores no histories; give the history")
        params = parse_request(request, self._options)
        return await self._served.recommender.recommend(params, Deadline(self._options.timeout_seconds))

    async def _recommend(self, request: pb.RecommendRequest) -> Recommendation:
        recommendation = await self._search(request)
        reply = to_reply(recommendation, secrets.token_hex(16), self._served, request.reply_options)
        return to_recommendation(cast(Any, reply), request_id="")

    async def _load(self, root: Path) -> _Served:
        bundle, options = open_bundle(root), self._options
        manifest = bundle.manifest
        catalogue, prompts = await asyncio.to_thread(read_items, bundle)
        planner = Planner(catalogue.trie, options.plan_limits, manifest.draft)
        target, draft = await self._models(bundle, planner)
        recommender = RecommenderOfBundle(
            manifest,
            catalogue,
            prompts,
            target,
            draft,
            planner,
            histories=None,
            speculation_breaker=SpeculationBreaker(),
        )
        return _Served(manifest, manifest.version, recommender)

    async def _models(self, bundle: Bundle, planner: Planner) -> tuple[InProcessTarget, InProcessDraft | None]:
        options, root = self._options, bundle.root
        shared: dict[str, Any] = {
            "bundle": root,
            "redis_url": SecretStr(""),
            "kv_memory_mb": options.cache_mb,
            "warm_up_seconds": options.warm_up_seconds,
            # A bundle that is overwritten here is the caller's affair: models and catalogue stay those of the start.
            "bundle_poll_seconds": 3600.0,
        }
        settings = TargetSettings(threads=options.threads, **shared)
        make = partial(SearchRunner, max_nodes=settings.max_nodes)
        targets = await self._resources.enter_async_context(served_models(settings, "target", make))
        target = InProcessTarget(targets.stable)
        if bundle.manifest.draft is None or not options.draft:
            return target, None
        drafts = await self._resources.enter_async_context(
            served_models(DraftSettings(**shared), "draft", make_drafter)
        )
        draft = InProcessDraft(drafts.stable)
        planner.set_curves(_curve(target), _curve(draft))
        return target, draft


def _quiet_logs() -> None:
    """Log warnings to standard error, if the application has not configured structlog: its default writes all to stdout."""
    if not structlog.is_configured():
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
            # Read for each line: notebooks and test runners replace standard error and close the earlier one.
            logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        )


# The stubs of the client and those of the services are of the same messages, which mypy cannot know.
def _message(request: RecommendRequest) -> pb.RecommendRequest:
    return cast("pb.RecommendRequest", request.message)


def _answer(future: Future[_Result]) -> _Result:
    try:
        return future.result()
    except ServiceError as error:
        raise status_error(call_status(error).message, request_id="", attempts=1) from error


def _outcome(future: Future[Recommendation]) -> Recommendation | CallError:
    try:
        return _answer(future)
    except CallError as error:
        return error


def _curve(model: InProcessTarget | InProcessDraft) -> CostCurve:
    return wire.cost_curve(model.model.info.cost_curve, "cost_curve")
