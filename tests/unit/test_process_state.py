"""A test that leaves the process changed is found."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path

import pytest

from tests.process_state import changed, process_state


def test_nothing_changed() -> None:
    assert changed(process_state()) == ""


def test_every_change_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = process_state()
    handler, level = signal.getsignal(signal.SIGPIPE), logging.root.level
    monkeypatch.setenv("ATSPEED_SOMETHING", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threading, "excepthook", sys.excepthook)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    logging.root.setLevel(logging.DEBUG - 1)
    try:
        assert changed(before).split(", ") == list(before)
    finally:
        signal.signal(signal.SIGPIPE, handler)
        logging.root.setLevel(level)
    monkeypatch.undo()
    assert changed(before) == ""
