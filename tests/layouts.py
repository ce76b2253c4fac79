"""A bundle as others lay it out: links of files, as a download cache has them, and links of folders, as a volume has them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

Layout = Callable[[Path, Path], Path]


def download_cache(source: Path, place: Path) -> Path:
    """Lay a bundle out like a snapshot of the Hugging Face hub: each file is a relative link to a blob."""
    blobs, snapshot = place / "blobs", place / "snapshots" / "main"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(place).parts) - 1)) / "blobs" / str(number))
    return snapshot


def mounted_volume(source: Path, place: Path) -> Path:
    """Lay a bundle out like a Kubernetes volume: its top entries are links into a folder that another link names."""
    shutil.copytree(source, place / "..2026_01_01")
    (place / "..data").symlink_to("..2026_01_01")
    for entry in (place / "..data").iterdir():
        (place / entry.name).symlink_to(Path("..data", entry.name))
    return place


LAYOUTS: list[Layout] = [download_cache, mounted_volume]
