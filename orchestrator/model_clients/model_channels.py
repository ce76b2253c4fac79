"""Channels to the replicas of both models."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import structlog

from atspeed.concurrency.tasks import background_task
from atspeed.configuration.settings import spelling
from atspeed.rpc.affinity import Routes
from atspeed.rpc.channels import open_channel
from atspeed.security.tokens import TokenError, TokenFile
from atspeed.v1 import draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from orchestrator.settings import OrchestratorSettings

_TARGET = target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name
_DRAFT = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name
# Longest wait for a draft before a bundle is served without one. A draft that loads the same bundle is ready within seconds; the
# lists do not need it.
_DRAFT_WAIT_SECONDS = 30.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass
class ModelChannels:
    """Channels of one snapshot: for each service one to its replicas in turn, and one by affinity key.

    Attributes:
        target_in_turn: channel to the targets in turn; None before `targets` is called.
        draft_in_turn: channel to the drafts in turn; None without a draft.
        target_reachable: false while no target replica is connected and serves the version.
    """

    settings: OrchestratorSettings
    resources: AsyncExitStack
    target_in_turn: grpc.aio.Channel | None = None
    draft_in_turn: grpc.aio.Channel | None = None
    target_reachable: bool = True

    async def targets(self, version: str) -> Routes[target_pb2_grpc.TargetServiceAsyncStub]:
        """Return routes to the targets that serve a version."""
        settings = self.settings
        tls = settings.model_tls(settings.target_name)
        self.target_in_turn, by_key = await self._pair(settings.target, _TARGET, version=version, tls=tls)
        watch = self._watch_targets(self.target_in_turn, version)
        await self.resources.enter_async_context(background_task(watch, "target-reachability"))
        stub = target_pb2_grpc.TargetServiceStub
        return Routes(stub(self.target_in_turn), stub(by_key), max_calls=settings.affinity_max_calls)

    async def drafts(self, address: str, version: str) -> Routes[draft_pb2_grpc.DraftServiceAsyncStub]:
        """Return routes to the drafts that serve a version."""
        settings = self.settings
        tls = settings.model_tls(settings.draft_name)
        self.draft_in_turn, by_key = await self._pair(address, _DRAFT, version=version, retried=["Plan"], tls=tls)
        stub = draft_pb2_grpc.DraftServiceStub
        return Routes(stub(self.draft_in_turn), stub(by_key), max_calls=settings.affinity_max_calls)

    async def wait_until_served(self) -> None:
        """Wait until a target serves the version and a draft does. The wait for the draft ends after `_DRAFT_WAIT_SECONDS`."""
        if self.target_in_turn is not None:
            await self.target_in_turn.channel_ready()
        if self.draft_in_turn is not None:
            try:
                async with asyncio.timeout(_DRAFT_WAIT_SECONDS):
                    await self.draft_in_turn.channel_ready()
            except TimeoutError:
                _log.warning("draft_not_served", waited_seconds=_DRAFT_WAIT_SECONDS)

    async def _watch_targets(self, channel: grpc.aio.Channel, version: str) -> None:
        while True:
            state = channel.get_state()
            reachable = state is not grpc.ChannelConnectivity.TRANSIENT_FAILURE
            if reachable is not self.target_reachable:
                self.target_reachable = reachable
                _log.warning("target_reachable" if reachable else "target_unreachable", model_version=version)
            await channel.wait_for_state_change(state)

    def _token(self) -> TokenFile | None:
        """Return the token file that calls to targets and drafts use. Raises TokenError naming the setting."""
        if self.settings.model_token_file is None:
            return None
        try:
            return TokenFile(self.settings.model_token_file)
        except TokenError as error:
            raise TokenError(f"{spelling(type(self.settings), 'model_token_file')}: {error}") from None

    async def _pair(self, target: str, service: str, **options: Any) -> tuple[grpc.aio.Channel, grpc.aio.Channel]:
        token = self._token()
        limit = self.settings.model_message_bytes
        channel = partial(open_channel, target, service, max_message_bytes=limit, token=token, **options)
        in_turn = await self.resources.enter_async_context(channel())
        return in_turn, await self.resources.enter_async_context(channel(by_key=True))
