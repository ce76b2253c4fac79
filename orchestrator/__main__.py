"""`python -m orchestrator` runs the orchestrator; `--help` lists its settings."""

from __future__ import annotations

import service_kit.quiet_grpc  # noqa: F401 - before anything imports grpc
from orchestrator.server import application
from orchestrator.settings import OrchestratorSettings
from service_kit.server import run

if __name__ == "__main__":
    run(OrchestratorSettings, application)
