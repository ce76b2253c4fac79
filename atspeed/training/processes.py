"""The processes of a run: one, or those of `accelerate launch` or torchrun.

With one process, none of these functions has an effect.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

_T = TypeVar("_T")
# The other processes wait while the main process evaluates or exports, longer than torch's default of ten minutes.
_TIMEOUT = timedelta(days=1)


def processes() -> PartialState:
    """Return the number of processes and the index of this one."""
    # One state per process: a later call's arguments are ignored. Without `cpu`, processes without a GPU find no backend.
    cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu, timeout=_TIMEOUT)


def device() -> torch.device:
    """Return this process's GPU, or the CPU if there is none."""
    found: torch.device = processes().device
    return found


def is_main() -> bool:
    """True in the process that writes the files and prints."""
    main: bool = processes().is_main_process
    return main


def wait_for_all() -> None:
    """Wait until every process has called this."""
    processes().wait_for_everyone()


def from_main(value: _T) -> _T:
    """Return the main process's value in every process."""
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def mean_and_any(value: float, flag: bool) -> tuple[float, bool]:
    """Return the mean of all processes' values, and True if any of them has its flag set."""
    state = processes()
    if state.num_processes == 1:
        return value, flag
    both = torch.tensor([value, float(flag)], device=state.device)
    torch.distributed.all_reduce(both)
    total, flags = both.tolist()
    return total / state.num_processes, flags > 0
