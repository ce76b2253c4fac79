"""Mistakes on the command line: every option of every command, and what a terminal or a script may hand over."""

from __future__ import annotations

import enum
import inspect
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import typer

from atspeed.cli import main
from atspeed.cli.commands import Commands, DeferredCommand
from research import __main__ as studies

ROOT = Path(__file__).parents[2]
LONE = "\udcff"
NUMBERS = {int: ["x", "-1", "1.5", "", "9" * 30, "9" * 5000], float: ["x", "-1", "nan", "inf", "-inf", "1e400", ""]}


@dataclass(frozen=True)
class Parameter:
    """A command's option or argument, with what Typer was told about it. option: its spelling; an argument's name."""

    command: tuple[str, ...]
    name: str
    option: str
    kind: Any
    info: Any
    required: bool

    @property
    def is_option(self) -> bool:
        return isinstance(self.info, type(typer.Option()))

    def written(self, value: str) -> list[str]:
        """The value as the command line has it."""
        return [f"{self.option}={value}"] if self.is_option else [value]


def kind_of(annotation: Any) -> Any:
    """The type of one value: without None, and the elements' of a list."""
    for inner in get_args(annotation):
        if get_origin(annotation) is not Literal and inner is not type(None):
            return kind_of(inner)
    return annotation


def spellings(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Command, name and spelling of every option and argument of the command line."""
    for name, below in getattr(command, "commands", {}).items():
        yield from spellings(below.load() if isinstance(below, DeferredCommand) else below, (*path, name))
    yield from ((path, parameter.name, parameter.opts[0]) for parameter in command.params)


def parameters(app: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[Parameter]:
    for group in app.registered_groups:
        assert group.typer_instance
        yield from parameters(group.typer_instance, (*path, str(group.name)))
    for registered in app.registered_commands:
        callback = registered.callback
        assert callback
        yield from parameters_of(callback, (*path, registered.name or callback.__name__.replace("_", "-")))
    for deferred in app.deferred if isinstance(app, Commands) else ():
        found, below = deferred.imported(), (*path, str(deferred.name))
        yield from parameters(found, below) if isinstance(found, Commands) else parameters_of(found, below)


def parameters_of(callback: Callable[..., Any], command: tuple[str, ...]) -> Iterator[Parameter]:
    for parameter in inspect.signature(callback, eval_str=True).parameters.values():
        assert get_origin(parameter.annotation) is Annotated
        plain, info = get_args(parameter.annotation)[:2]
        required = parameter.default is parameter.empty
        yield Parameter(command, parameter.name, SPELLED_AS[command, parameter.name], kind_of(plain), info, required)


COMMAND: Any = typer.main.get_command(main.app)
COMMAND.add_command(typer.main.get_command(studies.app), "research")  # here only: a command line of its own
SPELLED_AS = {(command, name): option for command, name, option in spellings(COMMAND)}
ALL = [*parameters(main.app), *parameters(studies.app, ("research",))]
assert len(ALL) > 200  # a walk that misses commands would prove nothing of them
SPELLED = {" ".join([*one.command, one.name]): one for one in ALL}


def some_value(parameter: Parameter, folder: Path) -> str:
    """A value that is no mistake."""
    if parameter.kind is Path:
        path = folder / ("file" if parameter.info.file_okay and not parameter.info.dir_okay else "folder")
        return str(path if parameter.info.exists else folder / "new")
    if get_origin(parameter.kind) is Literal:
        return str(get_args(parameter.kind)[0])
    if parameter.name == "url":
        return (folder / "folder").as_uri()
    return str(next(iter(parameter.kind))) if issubclass(parameter.kind, enum.Enum) else "1"


def mistakes(parameter: Parameter, folder: Path) -> list[str]:
    """Values that are."""
    kind, info = parameter.kind, parameter.info
    if kind is Path:
        wrong = [str(folder / "missing"), str(folder / "file" / "below")] if info.exists else []
        wrong += [str(folder / "folder")] if not info.dir_okay else []
        wrong += [str(folder / "file" / "below")] if info.callback else []
        return wrong + ([str(folder / "file")] if not info.file_okay else [])
    if kind in NUMBERS:
        return NUMBERS[kind]
    if kind is str:
        return [f"a{LONE}"]
    return [] if kind is bool else ["magic", "", LONE]


def one_line(*arguments: str, code: int = 2) -> str:
    """The message of a mistake: one line on standard error and nothing else, no traceback."""
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        COMMAND.main(list(arguments), prog_name="atspeed")
    assert (ended.value.code, out.getvalue(), err.getvalue().count("\n")) == (code, "", 1), err.getvalue()
    assert err.getvalue().startswith("atspeed: ")
    return err.getvalue()


@pytest.mark.parametrize("spelled", SPELLED)
def test_invalid_value_ends_in_one_line_that_names_the_option(spelled: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    wrong = SPELLED[spelled]
    given = [one for one in ALL if one.command == wrong.command and (one.required or one is wrong)]
    for value in mistakes(wrong, tmp_path):
        written = [one.written(value if one is wrong else some_value(one, tmp_path)) for one in given]
        line = one_line(*wrong.command, *itertools.chain(*written))
        assert f"'{wrong.option}'" in line, value


def test_numbers_have_bounds_and_paths_a_kind() -> None:
    """A number without bounds meets some library's own, in a traceback; a path of any kind is looked at too late."""
    free = {"data"}  # a folder or one file, as the recipe wants it
    for spelled, one in SPELLED.items():
        if one.kind is int:
            assert one.info.min is not None, spelled
            assert one.info.max is not None, spelled
        if one.kind is Path:
            assert not (one.info.file_okay and one.info.dir_okay) or one.name in free, spelled


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["recommend"], "--history"),
        (["recommend", "alice", "--history", "item-1"], "--history"),
        (["recommend", "alice", "--history", ""], "--history"),
        (["recommend", ""], "user"),
        (["recommend", "alice", "--only", ""], "--only"),
        (["recommend", "alice", "--exclude", "1,,2"], "--exclude"),
        (["recommend", "alice", "--exclude", ","], "--exclude"),
        (["recommend", "alice", "--exclude", '"1'], "--exclude"),
        (["recommend", "alice", "--mode", "magic"], "--mode"),
        (["recommend", "alice", "--address", "nowhere"], "--address"),
        (["recommend", "alice", "--address", "ipv4:nowhere:1"], "--address"),
        (["recommend", "alice", "--token", "secret\n"], "token"),
        (["recommend", "alice", "--key", __file__], "--key"),
        (["recommend", "alice", "--certificate", __file__], "--key"),
        (["recommend", "alice", "--server-name", "other"], "--server-name"),
        (["recommend", "alice", "item-1"], "item-1"),
        (["recommend", "alice", "--nonsense"], "--nonsense"),
        (["record", "alice"], "items"),
        (["record", "alice", ""], "items"),
        (["record", "alice", "1", ""], "items"),
        (["record", "alice", "1,"], "items"),
        (["record", "alice", "1\n2"], "items"),
        (["record", "", "1"], "user"),
        (["nonsense"], "nonsense"),
        (["bench", "nonsense"], "nonsense"),
        (["research", "nonsense"], "nonsense"),
        (["export", str(ROOT), "out", "--code-tokens", "9:3"], "--code-tokens"),
        (["up", "--bundle", str(ROOT), "--redis-url", "redis://localhost", "--data", "data"], "--data"),
    ],
)
def test_invalid_command_ends_in_one_line(arguments: list[str], named: str) -> None:
    line = one_line(*arguments)
    assert named in line
    assert "secret" not in line


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """A failure of the file system is one, whatever command meets it."""
    (tmp_path / "file").touch()
    bad = tmp_path / "file" / "run"
    recipe = ROOT / "runs" / "tiny.toml"
    assert f"{bad}: Not a directory" in one_line("train", str(recipe), "--run-folder", str(bad), code=1)


BUNDLE = ROOT / "bundles" / "movielens-100k"


@pytest.mark.parametrize(
    ("command", "content", "said"),
    [
        (["catalogue", "update", BUNDLE, "new", "--add", "FILE"], b"\xff", "UTF-8"),
        (["catalogue", "update", BUNDLE, "new", "--remove", "FILE"], b"\xff", "UTF-8"),
        (["bench", "lossless", "--bundle", BUNDLE, "--histories", "FILE"], b"\xff", "FILE"),
        (["bench", "report", "FILE", "--out", "pages"], b"\xff", "FILE: not a result"),
        (["bench", "report", "FILE", "--out", "pages"], b'{"header": 5, "rows": []}', "FILE: not a result"),
        (["bench", "report", "FILE", "--out", "pages"], b'{"header": {}, "rows": [5]}', "FILE: not a result"),
        (
            ["bench", "report", "FILE", "--out", "pages"],
            b'{"header": {}, "rows": [{}]}',
            "FILE: the benchmark None has no page",
        ),
        (
            ["bench", "report", "FILE", "--out", "pages"],
            b'{"header": {"benchmark": "load"}, "rows": []}',
            "FILE: not a result",
        ),
        (
            ["bench", "report", "FILE", "--out", "pages"],
            b'{"header": {"benchmark": "load"}, "rows": [{}]}',
            "another format",
        ),
        (["research", "report", "FILE", "--out", "pages"], b"\xff", "FILE: not a result"),
        (
            ["research", "report", "FILE", "--out", "pages"],
            b'{"header": {}, "rows": [{}]}',
            "FILE: the benchmark None has no page",
        ),
        (["research", "acceptance", "--bundle", BUNDLE, "--data", "FOLDER"], b"\xff", "items.jsonl"),
        (["recommend", "alice", "--ca", "FILE"], b"\xff", "FILE: not PEM"),
        (["train", "FILE", "--run-folder", "run"], b"\xff", "FILE"),
        (["bundle", "inspect", "FOLDER"], b"\xff", "manifest.json"),
        (["export", "FOLDER", "out"], b"\xff", "spelling.json"),
    ],
)
def test_file_with_other_content_ends_in_one_line(
    command: list[object], content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    for name in ("FILE", "FOLDER/manifest.json", "FOLDER/spelling.json"):
        (tmp_path / name).write_bytes(content)
    line = one_line(*map(str, command), code=2 if "--ca" in command else 1)
    assert said in line


def test_bounds_that_contradict_each_other_are_named() -> None:
    options = ["--users", "1", "--min-items", "9", "--max-items", "3"]
    line = one_line("bench", "prefix", "--bundle", str(BUNDLE), *options, code=1)
    assert "--max-items 3 is less than --min-items 9" in line


@pytest.mark.parametrize("given", ["9:3", "1", "1:", ":1", "a:b", "1:99999999999", f"1:{'9' * 5000}", "1:٣", "-1:2"])
def test_code_tokens_that_no_model_has_are_refused(given: str) -> None:
    assert "--code-tokens" in one_line("export", str(ROOT), "out", f"--code-tokens={given}")


def process(*arguments: str | bytes, **variables: str) -> subprocess.CompletedProcess[bytes]:
    command: list[str | bytes] = [sys.executable, "-m", "atspeed.cli.main", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([b"record", b"alice", b"caf\xe9"], b"items"),
        ([b"record", b"caf\xe9", b"1"], b"user"),
        ([b"recommend", b"--history", b"1,\xff"], b"--history"),
        ([b"recommend", b"alice", b"--tenant", b"\xc3"], b"--tenant"),
    ],
)
def test_argument_that_is_not_utf_8_is_a_mistake_of_the_command(arguments: list[bytes], named: bytes) -> None:
    done = process(*arguments, "--address", "127.0.0.1:1")
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_path_that_is_not_utf_8_is_printed_on_any_terminal(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(folder)).mkdir()
    done = process("bundle", "inspect", folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert b"manifest.json: No such file or directory" in done.stderr
    assert done.stderr.count(b"\n") == 1
