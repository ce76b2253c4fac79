"""Files of certificates that change while they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from atspeed.local.certificates import LocalCertificates
from atspeed.security.tls import WatchedPems


def empty(_: bytes) -> bytes:
    return b""


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def whole(content: bytes) -> bytes:
    return content


def gone(_: bytes) -> bytes:
    raise FileNotFoundError


@pytest.mark.parametrize("file", ["certificate", "key", "ca"])
@pytest.mark.parametrize("reads", [(empty, whole), (half, whole), (whole, gone), (whole, half)])
def test_what_is_just_being_written_is_left_for_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, reads: tuple[Callable[[bytes], bytes], ...]
) -> None:
    """gRPC ends the process for a key without a byte. Between the two reads Python finds the files whole."""
    certificates = LocalCertificates(tmp_path)
    files = certificates.files("target")
    watched = WatchedPems(files)
    before, path, read = watched.current, getattr(files, file), Path.read_bytes
    certificates.issue("target")
    faults = iter(reads)
    monkeypatch.setattr(Path, "read_bytes", lambda other: next(faults)(read(other)) if other == path else read(other))
    assert not watched.changed()
    assert watched.current == before
    monkeypatch.undo()
    path.touch()  # as the writer's last write does
    assert watched.changed()
    assert files.key
    assert watched.current.key == files.key.read_bytes()
