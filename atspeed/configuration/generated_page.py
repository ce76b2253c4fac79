"""Command line of the generators: write a generated file, or check it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def write_or_check(path: Path, text: str, command: str, arguments: Sequence[str] | None = None) -> int:
    """Write `text` to a file. With `--check` compare instead, and return 1 for a stale file.

    Args:
        command: the command that writes the file, for the message.
        arguments: command-line arguments, by default this process's.
    """
    parser = argparse.ArgumentParser(description=f"Write {path.name}.")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the file is stale, and write nothing")
    if not parser.parse_args(arguments).check:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{path.name} is stale, run `{command}`\n")
    return 1
