"""Settings of the target service."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from atspeed.configuration.settings import Port
from atspeed.model_host.settings import ModelSettings


class TargetSettings(ModelSettings):
    """Settings of a target replica."""

    model_config = SettingsConfigDict(env_prefix="ATSPEED_TARGET_")
    service: ClassVar[str] = "target"

    port: Port = 50052
    stream_idle_seconds: float = Field(default=60.0, gt=0, le=3600)
    """Time without a message after which an open stream is ended and its memory is freed."""
