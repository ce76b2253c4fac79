"""An imported checkpoint is served, and its lists are those of `generate` on the authors' own prompts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from atspeed.benchmarks.near_ties import Verdict, compare
from atspeed.benchmarks.services import ServiceOptions, ask, progress_bar, services
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import read_manifest
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Mode
from atspeed.training.pretrained import load_checkpoint
from atspeed_client import Recommendation, RecommendRequest
from tests.authors_prompts import PROMPTS, tokens_of_tail
from tests.checkpoints import MadeCheckpoint, make_checkpoint, random_paths
from tests.command_line import one_line, run
from tests.generated import generated, path_score
from tests.import_cells import CELLS, Cell, compared, imported

# Every layout and every family once, with the tail scored or dropped; `make imports` compares all pairs, with more users.
SOME = [
    ("minionerec", "qwen2", True), ("minionerec", "qwen3", False), ("lc-rec", "llama", True), ("lc-rec", "mistral", False),
    ("lc-rec", "phi3", True), ("lc-rec", "gemma", False), ("mimigenrec", "qwen2", True), ("openonerec", "qwen3", False),
    ("letter-tiger", "t5", True), ("letter-tiger", "t5", False),
]  # fmt: skip


@pytest.mark.parametrize(
    "cell", [cell for cell in CELLS if (cell.layout, cell.architecture, cell.tail) in SOME], ids=str
)
async def test_lists_are_those_of_generate_on_the_authors_prompts(cell: Cell, tmp_path: Path) -> None:
    users, widths = 4, (1, 10, 50)
    lists = await compared(cell, tmp_path, users, widths)
    assert len(lists) == users * len(widths) * 2
    assert {one.verdict for one in lists} <= {Verdict.IDENTICAL, Verdict.NEAR_TIE}
    assert max(one.gap for one in lists) < 1e-3
    assert read_manifest(tmp_path / "bundle").provenance.imported["layout"] == cell.layout


def test_items_are_added_by_the_names_of_their_codes(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, random_paths(40, 3), users=3)
    bundle = imported(made, tmp_path / "bundle", "--prompt", "minionerec")
    (tmp_path / "new.jsonl").write_text(json.dumps({"item_id": "new", "codes": made.paths["7"]}))
    done = run(
        "catalogue", "update", bundle, tmp_path / "next", "--add", tmp_path / "new.jsonl", "--remove", "/dev/null"
    )
    assert done.exit_code == 0, done.output
    catalogue = Bundle(tmp_path / "next").catalogue()
    new, known = catalogue.find(["new", "7"])
    assert catalogue.codes[new].tolist() == catalogue.codes[known].tolist()
    wrong = [*made.paths["7"][:2], "<c_999>"]
    (tmp_path / "new.jsonl").write_text(json.dumps({"item_id": "new", "codes": wrong}))
    line = one_line(run("catalogue", "update", bundle, tmp_path / "other", "--add", tmp_path / "new.jsonl"))
    assert "line 1: codes.2: '<c_999>' is no code of the bundle, which reads no other" in line


async def test_an_adapter_a_prompt_file_and_popular_items(tmp_path: Path) -> None:
    """A merged adapter, a prompt that is no layout, and the more popular one of two items that share a path."""
    peft = pytest.importorskip("peft")
    made = make_checkpoint(tmp_path, random_paths(40, 3))
    made.model.generation_config = GenerationConfig(repetition_penalty=1.8)  # type: ignore[no-untyped-call]
    made.model.generation_config.save_pretrained(made.folder)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        adapted = peft.get_peft_model(made.model, peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "prompt.txt").write_text("Items: {history}\n\n### Response:")
    (tmp_path / "counts.txt").write_text("0 1\n1 5\n")  # items 0 and 1 share their path
    bundle = imported(
        made, tmp_path / "bundle", "--adapter", tmp_path / "adapter", "--prompt", tmp_path / "prompt.txt", "--separator", " ",
        "--tail", r"\n{eos}", "--popularity", tmp_path / "counts.txt", "--save-checkpoint", tmp_path / "merged",
    )  # fmt: skip
    merged = load_checkpoint(tmp_path / "merged")
    made = replace(made, model=merged, paths={item: made.paths[item] for item in ["1", "0", *list(made.paths)[2:]]})
    users = made.users[:6]
    prompts = [
        made.tokenizer("Items: " + " ".join("".join(made.paths[item]) for item in user[-20:]) + "\n\n### Response:")[
            "input_ids"
        ]
        for user in users
    ]
    expected = [generated(made, prompt, tokens_of_tail("minionerec", made.tokenizer), 20) for prompt in prompts]
    assert any({"0", "1"} <= set(wanted.items) for wanted in expected)
    async with services(bundle, ServiceOptions(planner="fixed")) as client:
        requests = [RecommendRequest(history=user, k=20, beam_width=20, mode=Mode.STRICT) for user in users]
        with progress_bar() as progress:
            assert_equal(await ask(client, requests, progress=progress, title="lists"), expected)


async def test_paths_of_unequal_length_share_the_place_of_their_tail(tmp_path: Path) -> None:
    """A digit only where items collide: the tail ends short paths a level earlier, and their beams keep their places."""
    paths = random_paths(40, 3, codes=6)
    taken: dict[tuple[str, ...], int] = {}
    for item, path in paths.items():
        times = taken[tuple(path)] = taken.get(tuple(path), -1) + 1
        if times or item == "0":  # item 1 shares its three codes, so that only the tail tells their paths apart
            paths[item] = [*path, f"<d_{times}>"]
    made = make_checkpoint(tmp_path, paths)
    assert {len(path) for path in made.paths.values()} == {3, 4}
    bundle = imported(made, tmp_path / "bundle", "--prompt", "minionerec", "--unequal-paths")
    tail = tokens_of_tail("minionerec", made.tokenizer)
    users = made.users[:4]
    async with services(bundle, ServiceOptions(planner="fixed")) as client:
        for k in (1, 5, 20):
            expected = [
                padded_beam_search(made, PROMPTS["minionerec"](made.tokenizer, paths, user), tail, k) for user in users
            ]
            for mode in (Mode.TARGET_ONLY, Mode.STRICT):
                requests = [RecommendRequest(history=user, k=k, beam_width=k, mode=mode) for user in users]
                with progress_bar() as progress:
                    replies = await ask(client, requests, progress=progress, title="lists")
                assert_equal(replies, expected)


def assert_equal(replies: Sequence[Recommendation], expected: Sequence[RankedList]) -> None:
    """Every list has the expected items, near-ties apart, with the expected scores."""
    for reply, wanted in zip(replies, expected, strict=True):
        found = RankedList.of(reply.items)
        assert str(compare(found, wanted)) != "different", (found, wanted)
        assert found.scores == pytest.approx(wanted.scores, abs=1e-3)


def padded_beam_search(made: MadeCheckpoint, prompt: Sequence[int], tail: Sequence[int], k: int) -> RankedList:
    """The list of a beam search in which an ended path stays a beam, from passes of the checkpoint alone."""
    paths = {(*made.tokenizer.convert_tokens_to_ids(names), *tail): item for item, names in made.paths.items()}
    beams: dict[tuple[int, ...], float] = {(): 0.0}
    for length in range(max(map(len, paths))):
        grown = {beam: score for beam, score in beams.items() if beam in paths}
        for beam in beams.keys() - grown.keys():
            for child in {path[: length + 1] for path in paths if path[:length] == beam}:
                grown[child] = beams[beam] + path_score(made.model, [*prompt, *beam], child[length:])
        beams = dict(sorted(grown.items(), key=lambda entry: -entry[1])[:k])
    return RankedList(tuple(paths[beam] for beam in beams), tuple(beams.values()))
