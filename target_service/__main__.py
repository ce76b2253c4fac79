"""`python -m target_service` runs the target; `--help` lists its settings."""

from __future__ import annotations

import service_kit.quiet_grpc  # noqa: F401 - before anything imports grpc
from service_kit.server import run
from target_service.server import application
from target_service.settings import TargetSettings

if __name__ == "__main__":
    run(TargetSettings, application)
