"""Target and draft in this process: what the model services do, without messages.

Both implement the interfaces of `orchestrator.model_clients.interfaces`, so the recommender is the services' own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.errors import DeviceError, EngineError, NoNumbersError, OverloadedError
from atspeed.engine.kv.memory_cache import NO_USER_KEY
from atspeed.engine.model.tree_session import Selection, TreeSession
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import ROOT
from atspeed.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from atspeed.model_host.hosted_models import HostedModel
from draft_service.drafter import Drafter, DraftRequest
from orchestrator.degraded_reason import DegradedReason
from orchestrator.model_clients.model_request import ModelRequest, PlanUnansweredError
from orchestrator.model_clients.pass_ledger import MadePass, PassLedger
from orchestrator.planning.usage import Usage
from target_service.search_runner import Search, SearchRunner


class InProcessTarget:
    """The target model of this process."""

    def __init__(self, model: HostedModel[SearchRunner]) -> None:
        self.model = model

    def session(
        self,
        request: ModelRequest,
        *,
        max_children: int | None,
        beam_widths: BeamWidths | None = None,
        prefetches: bool = False,
        speculates: bool = False,
    ) -> InProcessTargetSession:
        """Open the target for one request; see `interfaces.TargetModel`."""
        limit = max_children or max(self.model.evaluator.trie.codebook_sizes)
        selection = Selection(request.pruning, limit, request.noise)
        search = Search(beam_widths, prefetches) if beam_widths else None
        return InProcessTargetSession(self.model, request, selection, search, speculates=speculates)


class InProcessTargetSession:
    """A token tree of one request; see `interfaces.RequestTarget`."""

    def __init__(
        self,
        model: HostedModel[SearchRunner],
        request: ModelRequest,
        selection: Selection,
        search: Search | None,
        *,
        speculates: bool,
    ) -> None:
        self._model = model
        self._request = request
        self._selection = selection
        self._search = search
        self._speculates = speculates
        self._tree: TreeSession | None = None
        self._seen: set[int] = set()
        self._ledger = PassLedger()
        self.usage.model_version = model.version

    @property
    def usage(self) -> Usage:
        """Return the stats of the passes that the search has used."""
        return self._ledger.usage

    @property
    def has_next_pass(self) -> bool:
        """Return whether the target has made the next pass already."""
        return self._ledger.has_next

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Make one pass, and after the first one an autonomous search if the session has one."""
        if (made := self._ledger.next_for(nodes)) is not None:
            return made
        started_ns = time.perf_counter_ns()
        try:
            with self._translated():
                async with asyncio.timeout(self._request.deadline.left()):
                    first, *further = await self._passes(nodes)
        finally:
            self.usage.waits.append(time.perf_counter_ns() - started_ns)
        self._ledger.add_ahead(further)
        for one in (first, *further):
            self._seen.update(one.evaluation.node.tolist())
        return self._ledger.count(first)

    def close(self) -> None:
        """Free the token tree, and forget passes that no call has asked for."""
        if self._tree is not None:
            self._model.evaluator.end(self._tree)
            self._tree = None
        self._seen.clear()
        self._ledger.clear()

    async def _passes(self, nodes: Int64) -> list[MadePass]:
        evaluator, request = self._model.evaluator, self._request
        needed = [node for node in evaluator.trie.with_ancestors(nodes).tolist() if node not in self._seen]
        search = None
        if self._tree is None:
            self._tree = await evaluator.open(
                request.prompt, tenant=request.tenant, user_key=request.user_key or NO_USER_KEY
            )
            needed.insert(0, ROOT)
            # A search that is repeated without plans starts here again, and the prefetched nodes may be the cause.
            search = self._search if not self.usage.retries else None
        asked = np.unique(np.asarray(needed, dtype=np.int64))
        if search is None:
            return [MadePass(*await evaluator.evaluate(self._tree, asked, self._selection))]
        passes = await self._model.worker.search(self._tree, asked, self._selection, search)
        return [MadePass(one.evaluation, one.cost) for one in passes]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise the recommender's errors for the engine's."""
        try:
            yield
        except OverloadedError as error:
            raise ResourceExhaustedError(str(error)) from None
        except DeviceError:
            raise UnavailableError("the model's device failed") from None
        except TimeoutError:
            raise DeadlineExceededError("the request's deadline has passed") from None
        except NoNumbersError as error:
            self.close()
            if not self._speculates:
                raise UnavailableError(f"the target gives no list: {error}") from None
            self._speculates = False
            self.usage.retries += 1
            raise PlanUnansweredError from None


class InProcessDraft:
    """The draft model of this process."""

    def __init__(self, model: HostedModel[Drafter]) -> None:
        self.model = model

    def session(self, request: ModelRequest, proposal: Proposal) -> InProcessDraftSession:
        """Return the draft for one request."""
        return InProcessDraftSession(self.model, request, proposal)


class InProcessDraftSession:
    """The draft for one request; see `sized_draft.DraftSource`.

    Attributes:
        prompt_tokens: length of the draft's prompt.
        usage: stats of the calls.
        degraded_reason: why the draft failed; None if it did not. After a failure it is not called again.
    """

    def __init__(self, model: HostedModel[Drafter], request: ModelRequest, proposal: Proposal) -> None:
        self._model = model
        self._request = request
        self._proposal = proposal
        self.prompt_tokens = len(request.prompt)
        self.usage = Usage(model_version=model.version)
        self.degraded_reason: DegradedReason | None = None

    async def plan(self, below: Beams, size: PlanSize, seconds: float) -> Plan:
        """Return a plan of this size below these beams, within `seconds`; an empty plan after a failure."""
        if self.degraded_reason is not None:
            return Plan.empty(below)
        started_ns = time.perf_counter_ns()
        try:
            async with asyncio.timeout(min(seconds, self._request.deadline.left())):
                drafted = await self._model.worker.plan(self._draft_request(below, size))
        except TimeoutError:
            self.degraded_reason = DegradedReason.DRAFT_DEADLINE
        except OverloadedError:
            self.degraded_reason = DegradedReason.DRAFT_BUSY
        except EngineError:
            self.degraded_reason = DegradedReason.DRAFT_FAILED
        else:
            self.usage.costs.append(drafted.cost)
            self.usage.passes += drafted.passes
            plan = drafted.plan
            return Plan(below, plan.node, plan.score, plan.margin, plan.evaluated)
        finally:
            self.usage.waits.append(time.perf_counter_ns() - started_ns)
        return Plan.empty(below)

    def _draft_request(self, below: Beams, size: PlanSize) -> DraftRequest:
        request = self._request
        return DraftRequest(
            prompt=request.prompt,
            below=below.take(np.argsort(below.node)),  # ascending node ids, as the drafter takes them
            size=size,
            proposal=self._proposal,
            pruning=request.pruning,
            noise=request.noise,
            with_evaluation=self._proposal is Proposal.SAMPLE,
            tenant=request.tenant,
            user_key=request.user_key or NO_USER_KEY,
        )
