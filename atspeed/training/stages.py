"""Stages of a run: each is kept, and skipped while its inputs stay the same."""

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
PIPELINE_VERSION = 1  # raise it when the same recipe would give another result


@dataclass(frozen=True)
class Stage:
    """One kept stage. It is finished as long as its key, the hash of its inputs, stays the same.

    Attributes:
        title: its name in messages.
        marker: the file that records its key, time and measures.
        key: the hash of its inputs.
        outputs: its files and folders.
        read: reads the outputs as their users do. A stage is made again if its outputs cannot be read.
        scratch: its files while it runs. Those of a killed run are resumed under the same key only.
        checkpoints: decides on stopping after the stage; None if no stage follows.
    """

    title: str
    marker: Path
    key: str
    outputs: tuple[Path, ...]
    read: Callable[[], object] = lambda: None
    scratch: tuple[Path, ...] = ()
    checkpoints: Checkpoints | None = None

    def run(self, work: Callable[[], Measures], *, together: bool = False) -> Measures:
        """Run the work unless it is finished. Outputs of another key are removed first; those of this key are resumed.

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
        """Remove outputs of another key, and outputs that cannot be read."""
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
        """Record the stage as finished, once its outputs can be read. Measures that are not finite are left out."""
        self.read()
        for path in self.scratch:
            remove(path)
        self._write(_Record(key=self.key, done=True, seconds=seconds, measures=finite(measures)))

    def _write(self, record: _Record) -> None:
        write_json(self.marker, record.model_dump())


class _Record(BaseModel):
    """The content of a stage's marker."""

    model_config = ConfigDict(frozen=True, strict=True)

    key: str = ""
    done: bool = False
    seconds: FiniteFloat = 0.0
    measures: dict[str, int | FiniteFloat] = {}


def key_of(*parts: object) -> str:
    """Hash the inputs of a stage, which are JSON values."""
    content = json.dumps([PIPELINE_VERSION, *parts], sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def partial_of(folder: Path) -> Path:
    """Return where a folder is written before it appears. The name is hidden, so that no folder of a user has it."""
    return folder.with_name(f".{folder.name}.partial")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
