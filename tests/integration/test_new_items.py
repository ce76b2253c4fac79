"""A new item from its text to users' lists: trained quantiser, codes, updated catalogue, hot reload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atspeed.cli import main
from atspeed.engine.bundle.bundle import Bundle
from atspeed.local.stack import LocalStack
from atspeed.v1 import recommendation_pb2 as pb
from tests.kinds_of_items import COLOURS, KINDS, recipe, write_data
from tests.serving import Client, Link, assert_same_list, ids, until


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new-items")
    data = write_data(folder / "data")
    (folder / "recipe.toml").write_text(recipe())
    run("train", folder / "recipe.toml", "--run-folder", folder / "run", "--data", data, "--threads", 1)
    return folder / "run" / "bundle"


def test_a_new_item_is_in_its_users_lists_where_the_target_alone_puts_it(trained: Path, tmp_path: Path) -> None:
    new = [
        {"item_id": "new soap", "text": "silver soap | Bath > Soap"},
        {"item_id": "new comb", "text": "silver comb | Hair > Comb"},
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, new)))
    run("catalogue", "encode", trained, tmp_path / "items.jsonl", "--out", tmp_path / "new.jsonl")
    run("catalogue", "update", trained, tmp_path / "updated", "--add", tmp_path / "new.jsonl")
    link, updated = Link(tmp_path / "bundle", Bundle(trained)), Bundle(tmp_path / "updated")
    flags: dict[str, dict[str, object]] = {
        role: {"bundle-poll-seconds": 0.1} for role in ("draft", "target", "orchestrator")
    }
    flags["orchestrator"] |= {"bundle-settle-seconds": 0.1, "draft-timeout-seconds": 30}
    histories = {kind: [str(first + step) for step in range(4)] for kind, first in (("soap", 0), ("comb", 8))}
    with LocalStack(link.path, log_folder=tmp_path, flags=flags) as stack, Client(stack.address) as client:
        before = {kind: client.recommend(history, k=32, beam_width=64) for kind, history in histories.items()}
        assert not any("new" in item for reply in before.values() for item in ids(reply))
        link.point_to(updated)
        until(lambda: client.info().versions.bundle == updated.manifest.version)
        for history in histories.values():
            wide = client.recommend(history, k=34, beam_width=64, mode=pb.MODE_TARGET_ONLY)
            assert {"new soap", "new comb"} <= set(ids(wide))  # the beams hold the whole catalogue
            for k in (1, 5, 10, 20):
                alone = client.recommend(history, k=k, mode=pb.MODE_TARGET_ONLY)
                assert_same_list(client.recommend(history, k=k), alone)
        known = client.recommend(["new soap", "0"], k=5)
        assert not known.unknown_history_item_ids


def test_the_quantiser_goes_with_the_bundle(trained: Path, tmp_path: Path) -> None:
    bundle = Bundle(trained)
    catalogue = bundle.catalogue()
    entry = bundle.manifest.quantiser
    assert entry is not None
    assert entry.encoder is not None
    assert (entry.encoder.text_form, entry.text_weight) == ("title | category", 0.7)
    assert bundle.quantiser(catalogue).sizes == catalogue.trie.codebook_sizes
    assert "all-MiniLM-L6-v2" in run("bundle", "inspect", trained)
    # Most items of the training get a code of their own first level again from their text alone.
    texts = [f"{colour} {kind} | {where}" for kind, where in KINDS.items() for colour in COLOURS]
    lines = [json.dumps({"item_id": str(place), "text": text}) for place, text in enumerate(texts)]
    (tmp_path / "again.jsonl").write_text("\n".join(lines))
    run("catalogue", "encode", trained, tmp_path / "again.jsonl", "--out", tmp_path / "out.jsonl")
    again = {
        line["item_id"]: line["codes"] for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    }
    same = [again[str(n)][0] == int(catalogue.codes[catalogue.find([str(n)])[0], 0]) for n in range(32)]
    assert sum(same) >= 24
