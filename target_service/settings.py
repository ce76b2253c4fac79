"""The target service's settings."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from service_kit.model_settings import ModelSettings
from service_kit.settings import Port


class TargetSettings(ModelSettings):
    """A target replica."""

    model_config = SettingsConfigDict(env_prefix="ATSPEED_TARGET_")
    service: ClassVar[str] = "target"

    port: Port = 50052
    stream_idle_seconds: Annotated[
        float,
        Field(
            gt=0,
            le=3600,
            description="How long an open stream may send nothing before it is ended and its memory freed.",
        ),
    ] = 60.0
