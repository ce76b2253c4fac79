"""Settings of the draft service."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from atspeed.configuration.settings import Port
from atspeed.model_host.settings import ModelSettings


class DraftSettings(ModelSettings):
    """Settings of a draft replica."""

    model_config = SettingsConfigDict(env_prefix="ATSPEED_DRAFT_")
    service: ClassVar[str] = "draft"

    port: Port = 50053
    threads: int = Field(default=1, ge=1, le=256)
    """CPU threads of one pass."""
