"""`python -m client` is the `atspeed` command line: signals count before its commands are loaded, which takes a second."""

from __future__ import annotations

import sys

from atspeed.concurrency.early_signals import leave_at_signals, unwind_at_sigterm


def main() -> None:
    """Run the command. `up` ends at a signal with exit code 0, as the services do, also before it has started anything."""
    if sys.argv[1:2] == ["up"]:
        leave_at_signals()
    else:
        unwind_at_sigterm()
    from atspeed.cli.main import app

    app()


if __name__ == "__main__":
    main()
