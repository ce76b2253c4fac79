"""Reads the arrays of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atspeed.engine.errors import CatalogueError


def read_array(path: Path) -> npt.NDArray[Any]:
    """Read an array into memory, without mapping the file: the served content is the checked content."""
    try:
        with path.open("rb") as file:
            array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            return array
    except MemoryError:
        raise CatalogueError(f"{path}: names more values than the memory holds") from None
    except (OSError, ValueError, EOFError) as error:
        raise CatalogueError(f"{path}: {error}") from error
