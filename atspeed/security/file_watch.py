"""How a file that may be replaced is known to be another.

Replace one by renaming a new one over it: a file that is written in place may be read half, and twice within a tick of the
file system's clock it may look the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = tuple[int, int, int]


def file_signature(path: Path) -> Stamp | None:
    """Time of change, inode and size; None where there is no file to see."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
