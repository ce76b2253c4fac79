"""`python -m draft_service` runs the draft; `--help` lists its settings."""

from __future__ import annotations

import service_kit.quiet_grpc  # noqa: F401 - before anything imports grpc
from draft_service.server import application
from draft_service.settings import DraftSettings
from service_kit.server import run

if __name__ == "__main__":
    run(DraftSettings, application)
