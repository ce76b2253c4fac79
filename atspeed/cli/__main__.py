"""Starts the `atspeed` command: `python -m atspeed.cli`.

Signals are handled before a command is loaded, which may take a second.
"""

from __future__ import annotations

import sys

from atspeed.concurrency.early_signals import leave_at_signals, unwind_at_sigterm


def main() -> None:
    """Run the command. A signal ends `up` with exit code 0, as it ends a service, even before anything was started."""
    if sys.argv[1:2] == ["up"]:
        leave_at_signals()
    else:
        unwind_at_sigterm()
    from atspeed.cli.main import app

    app()


if __name__ == "__main__":
    main()
