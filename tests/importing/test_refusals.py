"""Refusals of `atspeed import`: one line and exit code 1, before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import MadeCheckpoint, make_checkpoint, random_paths
from tests.command_line import one_line, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    """Checkpoint whose weights cannot be read: a reader of them fails."""
    made = make_checkpoint(tmp_path_factory.mktemp("made"), random_paths(30, 5), users=5)
    (made.folder / "model.safetensors").write_bytes(b"unreadable")
    return made


def refused(made: MadeCheckpoint, tmp_path: Path, *options: object, **files: Path) -> str:
    """The message of an import that is refused. Nothing is left behind."""
    given: dict[str, object] = {"index": made.index, "histories": made.histories, "prompt": "minionerec"} | files
    named = [word for name, value in given.items() for word in (f"--{name}", value)]
    line = one_line(run("import", made.folder, *named, "--out", tmp_path / "bundle", *options))
    assert not (tmp_path / "bundle").exists()
    assert "unreadable" not in line
    return line


def test_the_weights_are_read_last(made: MadeCheckpoint, tmp_path: Path) -> None:
    assert "transformers cannot load it" in refused(made, tmp_path)


def test_a_code_without_a_token_is_named(made: MadeCheckpoint, tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps(made.paths | {"5": ["<a_999>", *made.paths["5"][1:]]}))
    assert "code '<a_999>': the tokenizer has no such token, it encodes to" in refused(made, tmp_path, index=index)


def test_a_path_of_another_length_is_named(made: MadeCheckpoint, tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps(made.paths | {"5": made.paths["5"][:2]}))
    assert "item '5': a path of 2 codes, others have 3; --unequal-paths allows it" in refused(
        made, tmp_path, index=index
    )
    codes = "the beginning of another"  # without a tail nothing separates the two
    index.write_text(json.dumps(made.paths | {"5": made.paths["6"][:2]}))
    line = refused(made, tmp_path, "--unequal-paths", "--no-tail", index=index)
    assert str(index) in line, codes


def test_an_empty_path_is_named(made: MadeCheckpoint, tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps(made.paths | {"5": []}))
    assert "item '5': an empty path" in refused(made, tmp_path, index=index)


def test_an_item_without_a_path_is_named(made: MadeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text("3\n77\n")
    assert "item '77' has no path in" in refused(made, tmp_path, items=tmp_path / "items.txt")


def test_an_unknown_item_of_a_history_is_named(made: MadeCheckpoint, tmp_path: Path) -> None:
    histories = tmp_path / "histories.jsonl"
    histories.write_text('{"user": "u", "items": [1, 77]}\n')
    assert "line 1: item '77' is not in" in refused(made, tmp_path, histories=histories)


def test_a_token_beyond_the_embedding_is_named(made: MadeCheckpoint, tmp_path: Path) -> None:
    """Tokens were added, and the model was not resized."""
    folder = shutil.copytree(made.folder, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(made.tokenizer) - 1}))
    line = one_line(
        run(
            "import",
            folder,
            "--index",
            made.index,
            "--histories",
            made.histories,
            "--prompt",
            "lc-rec",
            "--out",
            tmp_path / "b",
        )
    )
    assert f"but the embedding has {len(made.tokenizer) - 1} rows" in line


def test_a_prompt_token_beyond_the_embedding_is_named(made: MadeCheckpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "checkpoint")
    tokenizer, rows = made.tokenizer, json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(rows)])
    tokenizer.save_pretrained(folder)
    (tmp_path / "prompt.txt").write_text("<extra_9> {history}")
    files = ("--index", made.index, "--histories", made.histories, "--prompt", tmp_path / "prompt.txt")
    line = one_line(run("import", folder, *files, "--out", tmp_path / "bundle"))
    assert "prompt: token '<extra_9>' is " in line
    assert f"but the embedding has {rows} rows" in line


def test_a_prompt_that_does_not_fit_the_positions(made: MadeCheckpoint, tmp_path: Path) -> None:
    line = refused(made, tmp_path, "--max-items", 400)
    assert "400 items take up to" in line
    assert "the model has 512 positions; --max-items takes fewer" in line


def test_an_unknown_layout_lists_the_known_ones(made: MadeCheckpoint, tmp_path: Path) -> None:
    line = one_line(
        run(
            "import",
            made.folder,
            "--index",
            made.index,
            "--histories",
            made.histories,
            "--prompt",
            "x",
            "--out",
            tmp_path / "b",
        )
    )
    assert "x: no such file, and no layout; layouts are lc-rec, minionerec" in line


def test_a_bundle_is_never_overwritten(made: MadeCheckpoint, tmp_path: Path) -> None:
    files = ("--index", made.index, "--histories", made.histories, "--prompt", "lc-rec")
    assert "exists already" in one_line(run("import", made.folder, *files, "--out", tmp_path))
    line = one_line(run("import", made.folder, *files, "--out", tmp_path / "b", "--save-checkpoint", made.folder))
    assert f"{made.folder}: exists already" in line


@pytest.mark.parametrize("name", ["Not A Name", "-x"])
def test_a_name_that_no_bundle_can_have_is_refused(name: str, made: MadeCheckpoint, tmp_path: Path) -> None:
    result = run("import", made.folder, "--index", made.index, "--histories", made.histories, "--prompt", "lc-rec",
                 "--out", tmp_path / "b", f"--name={name}")  # fmt: skip
    assert result.exit_code == 2
    assert "--name" in result.stderr


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A weight that is not finite is found by the export's own passes."""
    made = make_checkpoint(tmp_path / "made", random_paths(30, 5), users=2)
    table: Any = made.model.get_input_embeddings()
    with torch.no_grad():
        table.weight[made.tokenizer.convert_tokens_to_ids(made.paths["3"][0])] = float("nan")
    made.model.save_pretrained(made.folder)
    files = ("--index", made.index, "--histories", made.histories, "--prompt", "lc-rec")
    line = one_line(run("import", made.folder, *files, "--out", tmp_path / "b", "--save-checkpoint", tmp_path / "c"))
    assert "nan or inf in its pass" in line
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_tail_and_no_tail_contradict(made: MadeCheckpoint, tmp_path: Path) -> None:
    result = run("import", made.folder, "--index", made.index, "--histories", made.histories, "--prompt", "lc-rec",
                 "--out", tmp_path / "b", "--tail", "x", "--no-tail")  # fmt: skip
    assert result.exit_code == 2
    assert "--tail and --no-tail: give only one of them" in result.stderr


def test_export_refuses_ids_that_are_not_in_the_order_of_codes(made: MadeCheckpoint, tmp_path: Path) -> None:
    """Authors add names in lexicographic order: columns in the order of the ids would be other codes."""
    names = sorted({path[0] for path in made.paths.values()})
    first, last = (made.tokenizer.convert_tokens_to_ids(name) for name in (names[0], names[-1]))
    line = one_line(run("export", made.folder, tmp_path / "out", "--code-tokens", f"{first}:{last}"))
    assert "token ids are not in the order of the codes; `atspeed import` looks tokens up by name" in line


def test_a_folder_that_cannot_be_written_is_known_before_the_weights(made: MadeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = one_line(
        run(
            *("import", made.folder, "--index", made.index, "--histories", made.histories, "--prompt", "minionerec"),
            *("--out", tmp_path / "file" / "bundle"),
        )
    )
    assert f"{tmp_path / 'file' / 'bundle'}: not written: Not a directory" in line


@pytest.mark.parametrize("saved", ["bundle", "bundle/checkpoint", "."])
def test_a_saved_checkpoint_stands_apart_from_the_bundle(saved: str, made: MadeCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "new" / "bundle"
    line = one_line(
        run(
            *("import", made.folder, "--index", made.index, "--histories", made.histories, "--prompt", "minionerec"),
            *("--out", out, "--save-checkpoint", tmp_path / "new" / saved),
        )
    )
    assert "must be another folder than --out, and not in it" in line
    assert not (tmp_path / "new").exists()


def test_folders_of_a_user_are_never_replaced(tmp_path: Path) -> None:
    """A folder beside the new one keeps its content, and one that a killed import left does not."""
    made = make_checkpoint(tmp_path, random_paths(10, 5), users=3)
    (tmp_path / "bundle.partial").mkdir()
    (tmp_path / "bundle.partial" / "mine").write_text("")
    (tmp_path / ".bundle.partial").mkdir()
    (tmp_path / ".bundle.partial" / "left").write_text("")
    done = run(
        *("import", made.folder, "--index", made.index, "--histories", made.histories, "--prompt", "minionerec"),
        *("--out", tmp_path / "bundle", "--save-checkpoint", tmp_path / "saved"),
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "bundle.partial" / "mine").exists()
    assert not (tmp_path / ".bundle.partial").exists()
    assert not (tmp_path / "bundle" / "left").exists()
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


def test_a_prompt_with_carriage_returns_is_a_warning(made: MadeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"Items:\r\n{history}\r\n")
    done = run(
        *("import", made.folder, "--index", made.index, "--histories", made.histories),
        *("--prompt", tmp_path / "prompt.txt", "--out", tmp_path / "bundle"),
    )
    assert "its lines end with carriage returns, which are part of the prompt" in done.stderr
