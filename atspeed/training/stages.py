"""Stages of a run: each is kept in a folder and skipped while the hash of what it depends on stays the same."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from rich.console import Console

from atspeed.engine.errors import EngineError
from atspeed.engine.files.json_file import finite, write_json
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.errors import TrainingError
from atspeed.training.processes import from_main, is_main, wait_for_all

Measures = dict[str, float]
PIPELINE_VERSION = 1  # raise it when the same recipe would train something else


@dataclass(frozen=True)
class Stage:
    """One kept stage: done while its key, the hash of what it depends on, stays the same.

    title: its name for people. outputs: what it leaves. read: reads them as those do who need them; a stage is done once that
    works, and one whose outputs it refuses is made again. scratch: what it needs under way; left by a killed run, it is resumed
    under the same key only. checkpoints: asked once it is done; None: nothing comes after it.
    """

    title: str
    marker: Path
    key: str
    outputs: tuple[Path, ...]
    read: Callable[[], object] = lambda: None
    scratch: tuple[Path, ...] = ()
    checkpoints: Checkpoints | None = None

    def run(self, work: Callable[[], Measures], *, together: bool = False) -> Measures:
        """Do the work unless it is done; outputs of another key go first, those of this key are resumed.

        together: every process works, otherwise only the main one. All of them get its measures.
        """
        if is_main():
            self._clear_stale()
        wait_for_all()
        if not from_main(self._done):
            started = time.monotonic()
            measures = work() if together or is_main() else {}
            wait_for_all()
            if is_main():
                self._finish(measures, round(time.monotonic() - started, 1))
            wait_for_all()
            if self.checkpoints is not None:
                self.checkpoints.pause_if_stopping(f"{self.title} is done")
        return dict(self._record.measures)

    @property
    def _record(self) -> _Record:
        try:
            return _Record.model_validate_json(self.marker.read_bytes())
        except (OSError, ValidationError):
            return _Record()

    @property
    def _done(self) -> bool:
        record = self._record
        return record.key == self.key and record.done and all(path.exists() for path in self.outputs)

    def _clear_stale(self) -> None:
        """What was made under another key, or what its reader refuses, is gone after this."""
        if self._record.key != self.key or (self._done and not self._readable):
            for path in self.outputs + self.scratch:
                remove(path)
            self._write(_Record(key=self.key))

    @property
    def _readable(self) -> bool:
        try:
            self.read()
        except (EngineError, TrainingError, OSError, ValueError) as error:
            Console(stderr=True).print(
                f"{self.title} is made again: {error}", highlight=False, markup=False, soft_wrap=True
            )
            return False
        return True

    def _finish(self, measures: Measures, seconds: float) -> None:
        """Say that it is done, once its outputs are read back. Measures that are no numbers are left out."""
        self.read()
        for path in self.scratch:
            remove(path)
        self._write(_Record(key=self.key, done=True, seconds=seconds, measures=finite(measures)))

    def _write(self, record: _Record) -> None:
        write_json(self.marker, record.model_dump())


class _Record(BaseModel):
    """What a stage's marker says."""

    model_config = ConfigDict(frozen=True, strict=True)

    key: str = ""
    done: bool = False
    seconds: FiniteFloat = 0.0
    measures: dict[str, int | FiniteFloat] = {}


def key_of(*parts: object) -> str:
    """The hash of what a stage depends on: JSON values."""
    content = json.dumps([PIPELINE_VERSION, *parts], sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
