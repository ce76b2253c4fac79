"""Files that take their place in one step, and artefacts that are written so."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from atspeed.benchmarks.results import Result
from atspeed.engine.files.atomic_write import replace_text, replacing
from atspeed.local.certificates import LocalCertificates
from tests.catalogues import random_catalogue


def test_file_until_the_block_ends_keeps_its_old_content(tmp_path: Path) -> None:
    path, twin = tmp_path / "file", tmp_path / "twin"
    path.write_text("old")
    twin.hardlink_to(path)
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert twin.read_text() == "old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "twin"}


def fail_half_way(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("before", [[], ["old"]])
def test_failed_write_keeps_the_old_file(tmp_path: Path, before: list[str]) -> None:
    path = tmp_path / "file"
    for content in before:
        path.write_text(content)
    with pytest.raises(OSError, match="No space"):
        fail_half_way(path)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == before


def test_write_after_a_killed_process_succeeds(tmp_path: Path) -> None:
    (tmp_path / f".file.{os.getpid()}.partial").write_text("half")
    replace_text(tmp_path / "file", "whole")
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["whole"]


def test_write_through_link_or_device_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    replace_text(Path(os.devnull), "nothing")
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize(("mode", "expected"), [(0o666, 0o640), (0o600, 0o600)])
def test_permissions_of_a_new_file_follow_mode_and_umask(tmp_path: Path, mode: int, expected: int) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file", mode) as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == expected


def write_catalogue(folder: Path) -> None:
    random_catalogue(20, (4, 4), seed=0).save(folder)


def write_result(folder: Path) -> None:
    Result({"benchmark": "x"}, []).write(folder / "result.json")


def write_certificates(folder: Path) -> None:
    LocalCertificates(folder)


@pytest.mark.parametrize("write", [write_catalogue, write_result, write_certificates])
def test_artefacts_are_new_files_not_changed_old_ones(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """An old file that is open, or has another name, keeps its whole content."""
    write(tmp_path / "made")
    files = [path for path in (tmp_path / "made").rglob("*") if path.is_file()]
    assert files
    before = {path: path.read_bytes() for path in files}
    for number, path in enumerate(files):
        (tmp_path / str(number)).hardlink_to(path)
        path.unlink()
        path.hardlink_to(tmp_path / str(number))
    write(tmp_path / "made")
    for number, path in enumerate(files):
        assert not path.samefile(tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == before[path]
    assert {path for path in (tmp_path / "made").rglob("*") if path.is_file()} == set(files)
    keys = [path for path in files if path.suffix == ".key"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in keys)
