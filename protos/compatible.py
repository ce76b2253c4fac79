"""Compatibility of the contract with its last revision in git, by `buf breaking`.

The last revision is the newest commit whose contract differs from the working tree's. So a change is compared before its commit
and after it. Only commits that hold this file count: the contract was free to change before. A clone without such a commit, such
as one of depth 1 without changes, has nothing to compare.
"""

from __future__ import annotations

import io
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRACT = "protos/atspeed"
CHECK = "protos/compatible.py"
BUF = Path(sysconfig.get_path("scripts")) / "buf"  # comes as a wheel, beside this Python


def last_revision(root: Path) -> str | None:
    """Return the newest commit with another contract than the working tree's; None if there is none."""
    commits = _git(root, "log", "--format=%H", "HEAD", "--", CONTRACT).split()
    for commit in ["HEAD", *commits]:
        if not _git(root, "ls-tree", commit, CHECK):
            return None
        if _git(root, "diff", "--name-only", commit, "--", CONTRACT):
            return commit
    return None


def compare(root: Path, commit: str) -> int:
    """Compare the working tree with a commit. Returns the exit code of buf, which prints each broken rule."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "archive", commit, "protos", "buf.yaml"]
        archive = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        return subprocess.run([BUF, "breaking", "--against", folder], cwd=root, check=False).returncode


def main() -> None:
    """Compare, or say that there is nothing to compare."""
    try:
        commit = last_revision(ROOT)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"buf breaking: no git revision to compare with: {getattr(error, 'stderr', '') or error}".strip())
        return
    if commit is None:
        print("buf breaking: no earlier revision of the contract in this clone")
        return
    sys.exit(compare(ROOT, commit))


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
