"""Trains several runs at once, each in a process of one thread.

Small models gain more from several processes than from several threads.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from atspeed.training.errors import Paused, TrainingError
from atspeed.training.pipeline import TrainingRun
from atspeed.training.processes import processes

_PAUSED, _FAILED = 75, 1  # exit codes of a worker, those of the command line (atspeed/cli/failures.py)
_STOPPED = {_PAUSED, -signal.SIGTERM}  # the latter if the signal came before its handler was set
_LOOK_SECONDS = 0.2  # delay until a signal is passed on


_RESULTS = {True: "bundle", False: "draft-log.json"}  # in the folder of a finished run, by `bundled`


def train_all(runs: Sequence[TrainingRun], workers: int, *, bundled: bool = True) -> None:
    """Train the drafts of runs that share all stages up to the teacher, which are finished.

    bundled: whether their bundles are made too; otherwise they end with the draft.

    A worker takes the next run that no other has taken; in one process the runs follow each other. The results are the same.
    Raises Paused, and TrainingError.
    """
    if workers == 1 or not runs:
        _in_turn(runs, bundled)
        return
    if processes().num_processes > 1:
        raise TrainingError("--workers: must be 1 when a launcher such as torchrun has started several processes")
    # Spawned and not forked, since a fork loses the threads of torch.
    spawned = multiprocessing.get_context("spawn")
    taken: Synchronized[int] = spawned.Value("i", 0)
    started = [spawned.Process(target=_work, args=(runs, taken, bundled)) for _ in range(min(workers, len(runs)))]
    try:
        for process in started:
            process.start()
        _watch(started, runs)
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
    codes = [process.exitcode for process in started]
    if failed := [code for code in codes if code not in {0, *_STOPPED}]:
        raise TrainingError(f"{len(failed)} of {len(codes)} workers failed; their messages are above")
    if _STOPPED.intersection(codes):
        done = sum((run.folders.run / _RESULTS[bundled]).exists() for run in runs)
        raise Paused(f"{done} of {len(runs)} drafts are finished")


def _in_turn(runs: Sequence[TrainingRun], bundled: bool) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in runs:
            _finish(run, bundled)
    finally:
        torch.set_num_threads(threads)


def _finish(run: TrainingRun, bundled: bool) -> None:
    if bundled:
        run.bundle()
    else:
        run.align()


def _watch(started: Sequence[SpawnProcess], runs: Sequence[TrainingRun]) -> None:
    """Wait until all have ended. They know the time limit themselves, on the machine's clock; a signal is passed on once."""
    checkpoints, signalled = runs[0].checkpoints, False
    while alive := [process.sentinel for process in started if process.is_alive()]:
        wait(alive, timeout=_LOOK_SECONDS)
        if checkpoints.signalled and not signalled:
            signalled = True
            for process in started:
                process.terminate()


def _work(runs: Sequence[TrainingRun], taken: Synchronized[int], bundled: bool) -> None:
    """Run a worker. The runs share one `Checkpoints` here too, because they are pickled together."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TTY_INTERACTIVE"] = "0"  # lines instead of bars, which several processes would draw over each other
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call] # transformers' own, one per checkpoint
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    checkpoints = runs[0].checkpoints
    with checkpoints.stop_at_signals():
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # a terminal's Ctrl-C reaches all processes; the parent passes it on
        for run in _taken(runs, taken):
            try:
                with _locked(run.folders.pretrained):
                    run.pretrain()
                _finish(run, bundled)
            except Paused as paused:
                console.print(f"paused: {paused}", markup=False)
                sys.exit(_PAUSED)
            except TrainingError as error:
                console.print(f"{run.title}: {error}", style="red", markup=False)
                sys.exit(_FAILED)


def _taken(runs: Sequence[TrainingRun], taken: Synchronized[int]) -> Iterator[TrainingRun]:
    """Yield the runs that no other worker has taken."""
    while True:
        with taken.get_lock():
            index = taken.value
            taken.value += 1
        if index >= len(runs):
            return
        yield runs[index]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block. The lock of a process that died is free."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _end_with_parent() -> None:
    """End with the parent. A killed parent sends no signal, and the next command takes over the folders."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(_FAILED)
