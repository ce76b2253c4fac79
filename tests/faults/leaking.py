"""`python -m tests.faults.leaking`: the service named by LEAKING, with faults whose text is a secret wherever one can be.

The one step that turns a request into an order fails: in the handler, with a cause that failed in a worker thread; and leaves a
task and a pool's future that fail unheard, a thread and a finalizer that fail. With LEAKING_AT=start the start fails instead.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import runpy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SECRET = "hush-" + "13579"  # in two parts, so that no traceback's source line holds it
STEPS = {
    "draft_service": ("draft_service.server", "HostedModels.find"),
    "target_service": ("target_service.server", "HostedModels.find"),
    "orchestrator": ("orchestrator.server", "parse_request"),
}
_POOL = ThreadPoolExecutor(1)


def fail() -> None:
    """Raise the secret."""
    raise RuntimeError(f"password={SECRET} history=[{SECRET}]")


async def fail_later() -> None:
    """In a task without an awaiter."""
    fail()


class Finalized:
    """Fails when it is collected."""

    def __del__(self) -> None:
        fail()


def fail_everywhere(*_: Any) -> None:
    """Stands for the step."""
    loop = asyncio.get_running_loop()
    loop.create_task(fail_later())  # noqa: RUF006
    loop.run_in_executor(_POOL, fail)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Finalized()
    try:
        _POOL.submit(fail).result()
    except RuntimeError as cause:
        raise ValueError(SECRET) from cause


def main() -> None:
    """Run the service."""
    service = os.environ["LEAKING"]
    module, step = STEPS[service]
    if os.environ.get("LEAKING_AT") == "start":
        step = "open_first" if service == "orchestrator" else "served_models"
    owner: Any = importlib.import_module(module)
    *path, name = step.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, fail_everywhere)
    sys.argv[0] = service
    runpy.run_module(service, run_name="__main__")


if __name__ == "__main__":
    main()
