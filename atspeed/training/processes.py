"""The processes of a run: one, or as many as `accelerate launch` or torchrun started. In one, all of this does nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

_T = TypeVar("_T")
# The others wait while the main process evaluates or exports; torch would give up after ten minutes.
_PATIENCE = timedelta(days=1)


def processes() -> PartialState:
    """Which of how many processes this is."""
    # One per process: a later call's arguments are ignored. Without `cpu`, processes without a GPU would not find each other.
    cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu, timeout=_PATIENCE)


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    found: torch.device = processes().device
    return found


def is_main() -> bool:
    """Whether this process writes the files and prints."""
    main: bool = processes().is_main_process
    return main


def wait_for_all() -> None:
    """Go on when every process has come here."""
    processes().wait_for_everyone()


def from_main(value: _T) -> _T:
    """The main process's value, in every process."""
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def mean_and_any(value: float, flag: bool) -> tuple[float, bool]:
    """The mean of all processes' values, and whether any of them has its flag set."""
    state = processes()
    if state.num_processes == 1:
        return value, flag
    both = torch.tensor([value, float(flag)], device=state.device)
    torch.distributed.all_reduce(both)
    total, flags = both.tolist()
    return total / state.num_processes, flags > 0
