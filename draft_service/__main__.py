"""`python -m draft_service` runs the draft; `--help` lists its settings."""

from __future__ import annotations

import atspeed.rpc.quiet_grpc  # noqa: F401 - before anything imports grpc
from atspeed.rpc.server import run
from draft_service.server import application
from draft_service.settings import DraftSettings

if __name__ == "__main__":
    run(DraftSettings, application)
