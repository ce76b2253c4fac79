"""Detects that a file was replaced.

Replace a file by renaming a new one over it. A file that is written in place may be read half. Two writes within one tick of the
file system's clock may look the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

FileSignature: TypeAlias = tuple[int, int, int]


def file_signature(path: Path) -> FileSignature | None:
    """Return modification time in ns, inode and size; None without a readable file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
