"""Stages of a run: each is kept in a folder and skipped while the hash of what it depends on stays the same."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atspeed.training.checkpoints import Checkpoints
from atspeed.training.processes import is_main, wait_for_all

Measures = dict[str, float]
PIPELINE_VERSION = 1  # raise it when the same recipe would train something else


@dataclass(frozen=True)
class Stage:
    """One kept stage: done while its key, the hash of what it depends on, stays the same.

    title: its name for people. outputs: what it leaves. scratch: what it needs under way; left by a killed run, it is resumed
    under the same key only. checkpoints: asked once it is done; None: nothing comes after it.
    """

    title: str
    marker: Path
    key: str
    outputs: tuple[Path, ...]
    scratch: tuple[Path, ...] = ()
    checkpoints: Checkpoints | None = None

    def run(self, work: Callable[[], Measures], *, together: bool = False) -> Measures:
        """Do the work unless it is done; outputs of another key go first, those of this key are resumed.

        together: every process works, otherwise only the main one. All of them get its measures.
        """
        if is_main():
            self._clear_others()
        wait_for_all()
        done = self._done
        wait_for_all()
        if not done:
            started = time.monotonic()
            measures = work() if together or is_main() else {}
            wait_for_all()
            if is_main():
                self._finish(measures, round(time.monotonic() - started, 1))
            wait_for_all()
            if self.checkpoints is not None:
                self.checkpoints.pause_if_stopping(f"{self.title} is done")
        found: Measures = self._record["measures"]
        return found

    @property
    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.marker.read_text()) if self.marker.exists() else {}
        return record

    @property
    def _done(self) -> bool:
        record = self._record
        return record["key"] == self.key and record["done"] and all(path.exists() for path in self.outputs)

    def _clear_others(self) -> None:
        """What was made under another key is gone after this."""
        if self._record.get("key") != self.key:
            for path in self.outputs + self.scratch:
                remove(path)
            self._write({"key": self.key, "done": False})

    def _finish(self, measures: Measures, seconds: float) -> None:
        for path in self.scratch:
            remove(path)
        self._write({"key": self.key, "done": True, "seconds": seconds, "measures": measures})

    def _write(self, record: Mapping[str, Any]) -> None:
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.marker, record)


def key_of(*parts: object) -> str:
    """The hash of what a stage depends on: JSON values."""
    content = json.dumps([PIPELINE_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """In one step, so that a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
