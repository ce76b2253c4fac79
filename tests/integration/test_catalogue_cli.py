"""`atspeed catalogue update` and `atspeed export`: what they say of bad input, and what they leave when they fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atspeed.cli import main
from atspeed.engine.bundle.bundle import Bundle
from tests.bundles import TestBundle, random_model, write_bundle
from tests.catalogues import random_catalogue
from tests.layouts import LAYOUTS, Layout, download_cache

ROOT = Path(__file__).parents[2]
LARGEST = 4096  # bytes of a file: less than the catalogue's ids


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    return write_bundle(tmp_path_factory.mktemp("cli") / "bundle", random_catalogue(500, (12, 10), seed=2))


def run(*arguments: object) -> tuple[int, str]:
    """Return the exit code and the output."""
    done = CliRunner().invoke(main.app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def run_short_of_disk(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process that can write small files only."""
    return subprocess.run(
        # A shell sets the limit: a function that runs between fork and exec is not safe in a process with gRPC's threads.
        [
            "bash",
            "-c",
            f'ulimit -f {LARGEST // 1024}; exec "$@"',
            "_",
            sys.executable,
            "-m",
            "atspeed.cli",
            *map(str, arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def lines_of(path: Path, *items: Mapping[str, object], end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(item, ensure_ascii=False) + end for item in items).encode())
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_of_a_bundle_of_links_is_whole_by_itself(made: TestBundle, tmp_path: Path, layout: Layout) -> None:
    """The command once reported success for links whose targets were missing."""
    old, new = layout(made.root, tmp_path / "old"), tmp_path / "deep" / "new"
    assert run("bundle", "verify", old)[0] == 0
    assert run("catalogue", "update", old, new)[0] == 0
    shutil.rmtree(tmp_path / "old")
    assert run("bundle", "verify", new)[0] == 0
    assert not any(path.is_symlink() for path in new.rglob("*"))


def changed(root: Path) -> None:
    with (root / "draft/model.onnx").open("ab") as file:
        file.write(b"\0")


def dangling(root: Path) -> None:
    (root / "draft/model.onnx").unlink()
    (root / "draft/model.onnx").symlink_to("gone")


@pytest.mark.parametrize(
    ("corrupt", "problem"),
    [
        (changed, "draft/model.onnx: its SHA-256 differs from the manifest's"),
        (dangling, "draft/model.onnx: a link to gone, which does not exist"),
    ],
)
def test_update_of_a_bundle_that_no_service_takes_is_refused(
    made: TestBundle, tmp_path: Path, corrupt: Callable[[Path], None], problem: str
) -> None:
    old, place = download_cache(made.root, tmp_path / "old"), tmp_path / "place"
    place.mkdir()
    corrupt(old)
    code, said = run("catalogue", "update", old, place / "new")
    assert (code, said) == (1, f"atspeed: {old}/{problem}\n")
    assert not list(place.iterdir())


def test_update_into_the_bundle_itself_is_refused(made: TestBundle) -> None:
    code, said = run("catalogue", "update", made.root, made.root / "new")
    assert (code, "inside" in said) == (1, True)
    made.bundle.verify()


def test_update_on_a_full_disk_leaves_nothing_and_can_be_repeated(made: TestBundle, tmp_path: Path) -> None:
    """A second run once failed because the folder existed already."""
    done = run_short_of_disk("catalogue", "update", made.root, tmp_path / "new")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"{tmp_path}/new: not written: " in done.stderr
    assert "Success" not in done.stderr
    assert not list(tmp_path.iterdir())
    assert run("catalogue", "update", made.root, tmp_path / "new")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_update_reads_lines_as_all_readers_do(made: TestBundle, tmp_path: Path, end: str, mark: str) -> None:
    added = [f"a{character}b" for character in "\v\f\x1c\x85\u2028\u2029\xa0"]
    items = [{"item_id": item, "codes": [1, 1]} for item in added]
    add = lines_of(tmp_path / "add.jsonl", *items, end=f"{end}{end}")
    add.write_bytes(mark.encode() + add.read_bytes())
    assert run("catalogue", "update", made.root, tmp_path / "more", "--add", add)[0] == 0
    more = Bundle(tmp_path / "more").catalogue()
    assert more.find(added).min() >= 0
    remove = tmp_path / "remove.txt"
    remove.write_bytes((mark + end.join([*added, "", "item-1"])).encode())
    assert run("catalogue", "update", more_root(tmp_path), tmp_path / "fewer", "--remove", remove)[0] == 0
    fewer = Bundle(tmp_path / "fewer").catalogue()
    assert fewer.items == 499
    assert fewer.find([*added, "item-1"]).max() == -1


def more_root(folder: Path) -> Path:
    return folder / "more"


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        (
            [{"item_id": "a", "codes": [1, 1]}, {"item_id": "b", "codes": [1, 1]}, {"item_id": "a", "codes": [2, 2]}],
            "lines 1 and 3: item_id 'a' occurs more than once",
        ),
        ([{"item_id": "a", "codes": [1, 1]}] * 2, "lines 1 and 2: item_id 'a' occurs more than once"),
        ([{"item_id": "x" * 268, "codes": [1, 1]}], "line 1: item_id: has 268 bytes, at most 256 are allowed"),
        ([{"item_id": "", "codes": [1, 1]}], "line 1: item_id: is empty"),
        ([{"item_id": "a\0", "codes": [1, 1]}], "line 1: item_id: ends in NUL"),
        ([{"item_id": "a\nb", "codes": [1, 1]}], "line 1: item_id: holds a line end, so no line of a file can name it"),
        ([{"item_id": "a\r", "codes": [1, 1]}], "line 1: item_id: holds a line end, so no line of a file can name it"),
        ([{"item_id": " \t", "codes": [1, 1]}], "line 1: item_id: is blank, so no line of a file can name it"),
        ([{"item_id": "a", "codes": [1]}], "add: 'a': [1] has 1 codes; those of the catalogue have 2"),
        ([{"item_id": "a", "codes": ["1", 1]}], "line 1: codes.0: "),
        ([{"item_id": "a", "codes": [1, 99]}], "add: 'a': [1, 99] is not a code path"),
    ],
)
def test_update_with_an_item_that_cannot_be_one_is_refused(
    made: TestBundle, tmp_path: Path, items: list[dict[str, object]], problem: str
) -> None:
    """An id that stood twice once got the last codes."""
    add = lines_of(tmp_path / "add.jsonl", *items)
    code, said = run("catalogue", "update", made.root, tmp_path / "new", "--add", add)
    assert (code, problem in said, said.count("\n")) == (1, True, 1), said
    assert [path.name for path in tmp_path.iterdir()] == ["add.jsonl"]


def test_update_with_a_key_twice_in_a_line_is_refused(made: TestBundle, tmp_path: Path) -> None:
    (tmp_path / "add.jsonl").write_text('{"item_id": "a", "codes": [1, 1], "codes": [2, 2]}\n')
    said = run("catalogue", "update", made.root, tmp_path / "new", "--add", tmp_path / "add.jsonl")[1]
    assert "line 1: the key 'codes' occurs more than once" in said


def test_export_into_a_bundle_changes_no_other_that_shares_its_files(made: TestBundle, tmp_path: Path) -> None:
    """Both were overwritten in place, and with them what was served of either."""
    for name in ("first", "second"):
        assert run("catalogue", "update", made.root, tmp_path / name)[0] == 0
    random_model("llama", made.bundle.manifest.target.vocab_size, seed=9).save_pretrained(tmp_path / "checkpoint")
    assert run("export", tmp_path / "checkpoint", tmp_path / "first" / "target", "--code-tokens", "3:24")[0] == 0
    assert run("bundle", "verify", tmp_path / "second")[0] == 0
    code, said = run("bundle", "verify", tmp_path / "first")
    assert (code, "its SHA-256 differs from the manifest's" in said) == (1, True)


def test_export_on_a_full_disk_leaves_what_was_there(made: TestBundle, tmp_path: Path) -> None:
    random_model("llama", made.bundle.manifest.target.vocab_size, seed=9).save_pretrained(tmp_path / "checkpoint")
    assert run("catalogue", "update", made.root, tmp_path / "new")[0] == 0
    target = tmp_path / "new" / "target"
    done = run_short_of_disk("export", tmp_path / "checkpoint", target, "--code-tokens", "3:24")
    assert done.returncode == 1, done.stderr
    assert f"{target}: not written: File too large" in done.stderr
    assert run("bundle", "verify", tmp_path / "new")[0] == 0


def test_titles_follow_their_items(made: TestBundle, tmp_path: Path) -> None:
    """They change no model version, and items keep theirs when others come and go."""
    first, second, third = [made.bundle.catalogue().id_of(item) for item in range(3)]
    titles = lines_of(
        tmp_path / "titles", {"item_id": first, "title": "Heat (1995)"}, {"item_id": third, "title": "Ran"}
    )
    assert run("catalogue", "update", made.root, tmp_path / "titled", "--titles", titles)[0] == 0
    titled = Bundle(tmp_path / "titled")
    assert titled.catalogue().titles_of([first, second, third]) == {first: "Heat (1995)", third: "Ran"}
    assert titled.manifest.model_version("target") == made.bundle.manifest.model_version("target")
    assert titled.manifest.version != made.bundle.manifest.version
    gone = tmp_path / "gone"
    gone.write_text(f"{first}\n")
    more = lines_of(tmp_path / "more", {"item_id": second, "title": "Alien"})
    arguments = ("--remove", gone, "--titles", more)
    assert run("catalogue", "update", tmp_path / "titled", tmp_path / "later", *arguments)[0] == 0
    assert Bundle(tmp_path / "later").catalogue().titles_of([first, second, third]) == {second: "Alien", third: "Ran"}


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([{"item_id": "nobody's", "title": "x"}], 'titles: "nobody\'s" is not in the catalogue'),
        ([{"item_id": "item-1"}], "line 1: title: Field required"),
        ([{"item_id": "item-1", "title": "x" * 600}], "titles: a title has 600 bytes, at most 512 are allowed"),
        ([{"item_id": "item-1", "title": "x"}] * 2, "lines 1 and 2: item_id 'item-1' occurs more than once"),
    ],
)
def test_wrong_titles_are_named(
    made: TestBundle, tmp_path: Path, lines: list[Mapping[str, object]], problem: str
) -> None:
    code, said = run("catalogue", "update", made.root, tmp_path / "out", "--titles", lines_of(tmp_path / "t", *lines))
    assert code == 1
    assert problem in said.replace("\n", "")
    assert not (tmp_path / "out").exists()
