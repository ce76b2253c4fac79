"""`bench parity` with the user's own prompt finds what a comparison on the bundle's own prompts cannot find."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from atspeed.benchmarks.histories import choose_histories
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import write_manifest
from atspeed.training.pretrained import load_checkpoint
from tests.authors_prompts import PROMPTS
from tests.checkpoints import MadeCheckpoint, make_checkpoint, random_paths
from tests.command_line import one_line, run

USERS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("made"), random_paths(60, 3))


def imported(made: MadeCheckpoint, out: Path, *options: object) -> Path:
    files = ("--index", made.index, "--histories", made.histories, "--out", out)
    prompt = () if "--prompt" in options else ("--prompt", "minionerec")
    done = run("import", made.folder, *prompt, *files, *options)
    assert done.exit_code == 0, done.output
    return out


def parity(made: MadeCheckpoint, bundle: Path, *options: object) -> Any:
    chosen = ("--histories", made.histories, "--users", USERS)
    return run("bench", "parity", "--bundle", bundle, "--checkpoint", made.folder, *chosen, *options)


@pytest.fixture(scope="module")
def bundle(made: MadeCheckpoint) -> Path:
    return imported(made, made.folder.parent / "bundle")


def test_lists_are_those_of_the_users_own_prompt(made: MadeCheckpoint, bundle: Path, tmp_path: Path) -> None:
    """With a scored tail. The counts are those of the authors' own calls."""
    out = tmp_path / "parity.json"
    done = parity(made, bundle, "--prompt", "minionerec", "--index", made.index, "--json", out)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 8
    assert {row["prompts_different"] for row in rows} == {0}
    (counted,) = {(row["illegal_items"], row["bfloat16_different"]) for row in rows if row["k"] == 10}
    assert counted == authors_counts(made, Path(bundle), 10)
    assert counted[0] > 0


def authors_counts(made: MadeCheckpoint, bundle: Path, k: int) -> tuple[int, int]:
    """Illegal items among sets of codes per level, and lists that bfloat16 changes; by calls of `generate` alone."""
    tokenizer, model = made.tokenizer, load_checkpoint(made.folder)  # without generation defaults
    short: Any = copy.deepcopy(model)
    short.to(torch.bfloat16)
    eos, end = tokenizer.eos_token_id, tokenizer("\n", add_special_tokens=False)["input_ids"]
    legal = {(*tokenizer.convert_tokens_to_ids(names), *end, eos) for names in made.paths.values()}
    sets = [sorted({path[level] for path in legal}) for level in range(5)]
    trie: dict[tuple[int, ...], set[int]] = {}
    for path in legal:
        for level in range(5):
            trie.setdefault(path[:level], set()).add(path[level])

    def generated(prompt: list[int], form: Any, loose: bool) -> list[tuple[int, ...]]:
        def allowed(_: int, row: torch.Tensor) -> list[int]:
            path = tuple(row[len(prompt) :].tolist())
            return sets[len(path)] if loose else sorted(trie.get(path, {eos}))

        settings = {"num_beams": k, "num_return_sequences": k, "max_new_tokens": 5, "length_penalty": 0.0}
        found = form.generate(
            torch.tensor([prompt]), prefix_allowed_tokens_fn=allowed, do_sample=False, pad_token_id=0, **settings
        )
        return [tuple(row) for row in found[:, len(prompt) :].tolist()]

    prompts = [PROMPTS["minionerec"](tokenizer, made.paths, history) for history in read_users(made, bundle)]
    illegal = sum(path not in legal for prompt in prompts for path in generated(prompt, model, loose=True))
    changed = sum(generated(prompt, model, loose=False) != generated(prompt, short, loose=False) for prompt in prompts)
    return illegal, changed


def read_users(made: MadeCheckpoint, bundle: Path) -> list[list[str]]:
    """The users that the command draws."""
    drawn = choose_histories(Bundle(bundle).catalogue(), made.histories, USERS, 1)
    return [list(history) for history in drawn]


def test_a_wrong_separator_fails_on_the_users_prompt_only(made: MadeCheckpoint, tmp_path: Path) -> None:
    """On the bundle's own prompts all lists are identical, and say nothing."""
    wrong = imported(made, tmp_path / "wrong", "--separator", "; ")
    options = ("--prompt", "minionerec", "--no-counts", "-k", 10, "--json", tmp_path / "parity.json")
    done = parity(made, wrong, *options)
    assert done.exit_code == 1
    longer = sum(len(history) > 1 for history in read_users(made, wrong))
    assert f"beyond near-ties; {longer} of {USERS} prompts are not the bundle's" in done.stderr
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert [row["k"] for row in rows] == [10, 10]
    assert {row["prompts_different"] for row in rows} == {longer}
    assert parity(made, wrong, "--no-counts", "-k", 10).exit_code == 0


def test_the_options_of_an_import_are_those_of_the_comparison(made: MadeCheckpoint, tmp_path: Path) -> None:
    options = ("--separator", "\\n", "--max-items", 3)
    bundle = imported(made, tmp_path / "other", *options)
    chosen = ("--prompt", "minionerec", "--k", 3, "--no-counts")
    assert "prompts are not the bundle's" in one_line(parity(made, bundle, *chosen))
    done = parity(made, bundle, *chosen, *options)
    assert done.exit_code == 0, done.output


def test_code_tokens_in_another_order_are_found_by_the_index(
    made: MadeCheckpoint, bundle: Path, tmp_path: Path
) -> None:
    """Two columns change places, as when tokens are taken in the order of their ids."""
    opened = Bundle(bundle)
    entry, catalogue = opened.manifest.target, opened.catalogue()
    first, second = np_columns(catalogue.codes[:, 0].tolist())
    tokens = list(entry.code_tokens)
    tokens[first], tokens[second] = tokens[second], tokens[first]
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for part in ("catalogue", "target"):
        (wrong / part).symlink_to(bundle / part)
    changed = entry.model_copy(update={"code_tokens": tuple(tokens)})
    write_manifest(wrong, opened.manifest.model_copy(update={"target": changed}))
    message = one_line(parity(made, wrong, "--prompt", "minionerec", "--index", made.index))
    assert "index.json: item '" in message
    assert "and the bundle has" in message


def test_numbered_titles_are_served_as_the_user_writes_them(made: MadeCheckpoint, tmp_path: Path) -> None:
    """Lists of a bundle whose items have texts. It cannot get other items, whose texts need the tokenizer."""
    items, prompt = tmp_path / "items.json", tmp_path / "prompt.txt"
    items.write_text(
        json.dumps({item: {"title": f"Pen {item}." if int(item) % 2 else f"({item}) "} for item in made.paths})
    )
    prompt.write_text("Items:\n{history}\n\n### Response:\n")
    options = (
        "--prompt",
        prompt,
        "--items",
        items,
        "--separator",
        "\\n",
        "--item",
        "{number}. {title}",
        "--max-items",
        8,
    )
    bundle = imported(made, tmp_path / "bundle", *options)
    done = parity(
        made, bundle, *options, "--index", made.index, "--no-counts", "-k", 1, "-k", 10, "--json", tmp_path / "p.json"
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert {(row["prompts_different"], row["different"]) for row in rows} == {(0, 0)}
    assert parity(made, bundle, "--no-counts", "-k", 5).exit_code == 0  # on the prompts of the bundle
    removed = tmp_path / "removed.txt"
    removed.write_text("5\n")
    message = one_line(run("catalogue", "update", bundle, tmp_path / "next", "--remove", removed))
    assert "target.prompt.texts: are those of the items of catalogue" in message
    assert "import the checkpoint with the new items" in message


def test_an_adapter_is_merged_and_unserved_items_are_left_out(made: MadeCheckpoint, tmp_path: Path) -> None:
    """An adapter or a base, as `atspeed import` takes them. Without the adapter the lists are another model's."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        adapted = peft.get_peft_model(
            load_checkpoint(made.folder), peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"])
        )
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    items = tmp_path / "items.txt"
    items.write_text("\n".join(list(made.paths)[:40]))
    adapter = ("--adapter", tmp_path / "adapter")
    bundle = imported(made, tmp_path / "bundle", "--items", items, *adapter)
    options = ("--prompt", "minionerec", "--index", made.index, "--no-counts", "-k", 10)
    done = parity(made, bundle, *options, *adapter)
    assert done.exit_code == 0, done.output
    told = re.search(r"warning: (\d) of 8 histories hold items that are not served", " ".join(done.stderr.split()))
    assert told is not None
    assert int(told[1]) > 0
    without = parity(made, bundle, *options)
    assert without.exit_code == 1
    assert "lists differ from Hugging Face generate" in without.stderr


def np_columns(used: list[int]) -> tuple[int, int]:
    """Two codes that items have."""
    first, second = sorted(set(used))[:2]
    return first, second


def test_another_tail_is_told(made: MadeCheckpoint, tmp_path: Path) -> None:
    """The lists are those of the bundle's own rule; that it is not the authors' is a warning."""
    without = imported(made, tmp_path / "without", "--no-tail")
    done = parity(made, without, "--prompt", "minionerec", "--no-counts", "-k", 1)
    assert done.exit_code == 0, done.output
    assert (
        "warning: the prompt's layout scores '\u010a' '<|endoftext|>' behind the codes, the bundle nothing"
        in done.stderr
    )


def test_options_of_the_prompt_need_it(made: MadeCheckpoint, bundle: Path) -> None:
    done = parity(made, bundle, "--index", made.index)
    assert done.exit_code == 2
    assert "--tokenizer, --index, --items, --separator, --item and --max-items need --prompt" in done.stderr
