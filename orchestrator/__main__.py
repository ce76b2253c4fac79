"""`python -m orchestrator` runs the orchestrator; `--help` lists its settings."""

from __future__ import annotations

from atspeed.concurrency.early_signals import leave_at_signals


def main() -> None:
    """Run the service until a signal ends it."""
    leave_at_signals()
    import atspeed.rpc.quiet_grpc  # noqa: F401 - before anything imports grpc
    from atspeed.rpc.server import run
    from orchestrator.server import application
    from orchestrator.settings import OrchestratorSettings

    run(OrchestratorSettings, application)


if __name__ == "__main__":
    main()
