"""`python -m target_service` runs the target; `--help` lists its settings."""

from __future__ import annotations

import atspeed.rpc.quiet_grpc  # noqa: F401 - before anything imports grpc
from atspeed.rpc.server import run
from target_service.server import application
from target_service.settings import TargetSettings

if __name__ == "__main__":
    run(TargetSettings, application)
