"""The channels to the replicas of both models."""

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
_DRAFT_PATIENCE_SECONDS = 30.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass
class ModelChannels:
    """The channels that one snapshot's calls go over, by service: to replicas in turn, and by key.

    reach_targets: False while every target is known not to serve the version, or not to be there.
    """

    settings: OrchestratorSettings
    resources: AsyncExitStack
    target_in_turn: grpc.aio.Channel | None = None
    draft_in_turn: grpc.aio.Channel | None = None
    reach_targets: bool = True

    async def targets(self, version: str) -> Routes[target_pb2_grpc.TargetServiceAsyncStub]:
        """To the targets that serve a version."""
        settings = self.settings
        tls = settings.model_tls(settings.target_name)
        self.target_in_turn, by_key = await self._pair(settings.target, _TARGET, version=version, tls=tls)
        following = self._follow_targets(self.target_in_turn, version)
        await self.resources.enter_async_context(background_task(following, "targets-reached"))
        stub = target_pb2_grpc.TargetServiceStub
        return Routes(stub(self.target_in_turn), stub(by_key), most_at_once=settings.affinity_max_calls)

    async def drafts(self, address: str, version: str) -> Routes[draft_pb2_grpc.DraftServiceAsyncStub]:
        """To the drafts that serve a version."""
        settings = self.settings
        tls = settings.model_tls(settings.draft_name)
        self.draft_in_turn, by_key = await self._pair(address, _DRAFT, version=version, retried=["Plan"], tls=tls)
        stub = draft_pb2_grpc.DraftServiceStub
        return Routes(stub(self.draft_in_turn), stub(by_key), most_at_once=settings.affinity_max_calls)

    async def served(self) -> None:
        """Return when a target serves the version, and a draft does or has had its time."""
        if self.target_in_turn is not None:
            await self.target_in_turn.channel_ready()
        if self.draft_in_turn is not None:
            try:
                async with asyncio.timeout(_DRAFT_PATIENCE_SECONDS):
                    await self.draft_in_turn.channel_ready()
            except TimeoutError:
                _log.warning("no draft serves the bundle, going on without one")

    async def _follow_targets(self, channel: grpc.aio.Channel, version: str) -> None:
        while True:
            state = channel.get_state()
            reached = state is not grpc.ChannelConnectivity.TRANSIENT_FAILURE
            if reached is not self.reach_targets:
                self.reach_targets = reached
                event = "a target serves the version again" if reached else "no target serves the version"
                _log.warning(event, model_version=version)
            await channel.wait_for_state_change(state)

    def _token(self) -> TokenFile | None:
        """What targets and drafts are shown. Raises TokenError naming the setting."""
        if self.settings.model_token_file is None:
            return None
        try:
            return TokenFile(self.settings.model_token_file)
        except TokenError as error:
            raise TokenError(f"{spelling(type(self.settings), 'model_token_file')}: {error}") from None

    async def _pair(self, target: str, service: str, **options: Any) -> tuple[grpc.aio.Channel, grpc.aio.Channel]:
        token = self._token()
        limit = self.settings.model_message_bytes
        made = partial(open_channel, target, service, max_message_bytes=limit, token=token, **options)
        in_turn = await self.resources.enter_async_context(made())
        return in_turn, await self.resources.enter_async_context(made(by_key=True))
