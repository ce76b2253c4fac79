"""`python -m draft_service` runs the draft; `--help` lists its settings."""

from __future__ import annotations

from atspeed.concurrency.early_signals import leave_at_signals


def main() -> None:
    """Run the service until a signal ends it."""
    leave_at_signals()
    import atspeed.rpc.quiet_grpc  # noqa: F401 - before anything imports grpc
    from atspeed.rpc.server import run
    from draft_service.server import application
    from draft_service.settings import DraftSettings

    run(DraftSettings, application)


if __name__ == "__main__":
    main()
