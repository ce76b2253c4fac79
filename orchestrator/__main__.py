"""`python -m orchestrator` runs the orchestrator; `--help` lists its settings."""

from __future__ import annotations

import atspeed.rpc.quiet_grpc  # noqa: F401 - before anything imports grpc
from atspeed.rpc.server import run
from orchestrator.server import application
from orchestrator.settings import OrchestratorSettings

if __name__ == "__main__":
    run(OrchestratorSettings, application)
