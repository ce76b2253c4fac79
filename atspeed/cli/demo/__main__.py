"""Entry point of `python -m atspeed.cli.demo`."""

import sys

from atspeed.cli.demo.demonstration import main
from atspeed.concurrency.early_signals import unwind_at_sigterm

if __name__ == "__main__":
    unwind_at_sigterm()
    sys.exit(main())
