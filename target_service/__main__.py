"""`python -m target_service` runs the target; `--help` lists its settings."""

from __future__ import annotations

from atspeed.concurrency.early_signals import leave_at_signals


def main() -> None:
    """Run the service until a signal ends it."""
    leave_at_signals()
    import atspeed.rpc.quiet_grpc  # noqa: F401 - before anything imports grpc
    from atspeed.rpc.server import run
    from target_service.server import application
    from target_service.settings import TargetSettings

    run(TargetSettings, application)


if __name__ == "__main__":
    main()
