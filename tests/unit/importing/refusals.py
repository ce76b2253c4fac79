"""Files that an import refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from atspeed.importing.errors import ImportingError


def refusal(read: Callable[[Path], object], path: Path, content: str) -> str:
    """Return the message with which a reader refuses a file of this content. It names the file."""
    path.write_text(content)
    with pytest.raises(ImportingError) as caught:
        read(path)
    assert path.name in str(caught.value)
    return str(caught.value)
