"""The command line: bundles, models, measurements, and `atspeed up` as a real process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from atspeed.engine.bundle.bundle import Bundle
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from tests.bundles import TestBundle, write_bundle
from tests.catalogues import random_catalogue
from tests.command_line import alive, one_line, read_line, run, started
from tests.conftest import mended

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    root = tmp_path_factory.mktemp("cli") / "bundle"
    made = write_bundle(root, random_catalogue(200, (12, 10, 8), seed=2))
    made.target.save_pretrained(root.parent / "checkpoint")
    return made


def test_bundle_inspect_and_verify(made: TestBundle, tmp_path: Path) -> None:
    """A sound bundle, as a table and as JSON; and none."""
    assert "200 items" in run("bundle", "inspect", made.root).stdout
    assert json.loads(run("bundle", "inspect", made.root, "--json").stdout)["name"] == "random"
    assert made.bundle.manifest.version in run("bundle", "verify", made.root).stdout
    assert json.loads(run("bundle", "verify", made.root, "--json").stdout) == {
        "bundle": str(made.root),
        "version": made.bundle.manifest.version,
        "files": len(made.bundle.manifest.files),
        "signed_by_key": None,
    }
    assert "manifest.json" in one_line(run("bundle", "inspect", tmp_path))


def test_catalogue_update_changes_items_and_refuses_mistakes(made: TestBundle, tmp_path: Path) -> None:
    new, add, remove = tmp_path / "new", tmp_path / "add.jsonl", tmp_path / "remove.txt"
    codes = [0] * made.bundle.catalogue().trie.levels
    add.write_text(json.dumps({"item_id": "new", "codes": codes}) + "\n")
    remove.write_text("item-1\nitem-2\n")
    said = run("catalogue", "update", made.root, new, "--add", add, "--remove", remove).stdout
    version = Bundle(new).manifest.version
    assert version in said
    assert version in run("bundle", "verify", new).stdout
    assert Bundle(new).catalogue().find(["new", "item-1", "item-2"]).tolist()[1:] == [-1, -1]
    assert "exists already" in one_line(run("catalogue", "update", made.root, new))
    add.write_text("{}\n")
    assert "line 1: item_id: " in one_line(run("catalogue", "update", made.root, tmp_path / "other", "--add", add))


def test_bundle_verify_finds_a_changed_file(tmp_path: Path) -> None:
    """One byte more is enough."""
    made = write_bundle(tmp_path, random_catalogue(20, (4, 4), seed=1))
    with (tmp_path / "target" / "model.onnx.data").open("ab") as file:
        file.write(b"\0")
    assert "model.onnx.data: its SHA-256 differs from the manifest's" in one_line(run("bundle", "verify", made.root))


def test_export(made: TestBundle, tmp_path: Path) -> None:
    """A checkpoint to ONNX; without a spelling the code tokens must be given."""
    checkpoint = made.root.parent / "checkpoint"
    assert "--code-tokens" in one_line(run("export", checkpoint, tmp_path / "out"))
    result = run("export", checkpoint, tmp_path / "out", "--code-tokens", "3:32")
    assert result.exit_code == 0, result.output
    assert "llama" in result.stdout
    assert (tmp_path / "out" / "model.onnx").exists()


def test_train_names_the_recipe_at_fault(tmp_path: Path) -> None:
    """A recipe that is not there."""
    missing = tmp_path / "none.toml"
    result = run("train", missing, "--run-folder", tmp_path / "run")
    assert result.exit_code == 2
    assert "none.toml" in result.stderr


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installation for serving alone has no torch."""
    for name in [name for name in sys.modules if name.startswith("atspeed.training.pipeline")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    recipe = ROOT / "runs" / "tiny.toml"
    message = one_line(run("train", recipe, "--run-folder", tmp_path / "run"))
    assert "torch is not installed: pip install 'atspeed-serving[train]'" in message


def test_bench_lossless(made: TestBundle, tmp_path: Path) -> None:
    """All rules are compared, and the result file names its origin."""
    out = tmp_path / "lossless.json"
    options = ["--users", 6, "-k", 5, "--excluded", 10, "--rule", "all", "--json", out]
    result = run("bench", "lossless", "--bundle", made.root, *options)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert {row["rule"]: row["identical"] + row["near_ties"] for row in written["rows"]} == dict.fromkeys(
        ("vocab", "trie", "codes"), 6
    )
    assert [row["invalid_paths"] for row in written["rows"]] == [0, 0, 0]
    assert re.search(
        r"identical to target-only: (yes|near-tie) \(\d+ identical, \d+ near-tie, 0 different\)", result.stdout
    )
    assert written["header"]["bundle"]["version"] == made.bundle.manifest.version
    assert written["header"]["machine"]["cores"] == os.cpu_count()


def test_bench_lossless_with_every_place_of_a_prefix(made: TestBundle, tmp_path: Path) -> None:
    """A row for each place and K, and the tokens that came from there."""
    out = tmp_path / "lossless.json"
    places = [option for place in ("cold", "memory", "redis") for option in ("--prefix", place)]
    options = ["--users", 4, "-k", 1, "-k", 3, "--excluded", 0, *places, "--json", out]
    result = run("bench", "lossless", "--bundle", made.root, *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["prefix"], row["k"]) for row in rows] == [(p, k) for p in ("cold", "memory", "redis") for k in (1, 3)]
    assert all(row["different"] == row["invalid_paths"] == 0 for row in rows)
    cold, memory, redis = ([row["cached_tokens_mean"] for row in rows[at : at + 2]] for at in (0, 2, 4))
    assert cold == [0, 0]
    assert min(memory) > 0
    assert max(redis) > 0


def test_bench_invariance_goes_on_where_it_was_cut(made: TestBundle, tmp_path: Path) -> None:
    out = tmp_path / "invariance.json"
    options = ["--trees", 4, "--part", 2, "--prompt", 12, "--nodes", 6, "--batch", 1, "--threads", 1, "--json", out]
    assert run("bench", "invariance", "--bundle", made.root, *options).exit_code == 0
    whole = json.loads(out.read_text())
    assert [row["trees"] for row in whole["rows"]] == [2, 2]
    cut = {**whole, "rows": [{**whole["rows"][1], "compared": 1_000_000}]}
    out.write_text(json.dumps(cut))
    result = run("bench", "invariance", "--bundle", made.root, *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert rows == [*cut["rows"], whole["rows"][0]]
    other = run("bench", "invariance", "--bundle", made.root, *options, "--nodes", 7)
    assert "holds parts of another run (nodes)" in one_line(other)


@pytest.mark.parametrize("models", [[], ["--bundle", "BUNDLE", "--family", "llama"]])
def test_bench_invariance_has_one_kind_of_models(made: TestBundle, models: list[str]) -> None:
    options = [str(made.root) if option == "BUNDLE" else option for option in models]
    assert "--bundle or --family" in one_line(run("bench", "invariance", *options))


def test_bench_parity(made: TestBundle, tmp_path: Path) -> None:
    """Real histories from a file; an unknown item in it is named with its line."""
    histories = tmp_path / "test.txt"
    histories.write_text("u1 item-1 item-2\nu2\nu3 item-9\n")
    out, checkpoint = tmp_path / "parity.json", made.root.parent / "checkpoint"
    arguments = ["bench", "parity", "--bundle", made.root, "--checkpoint", checkpoint, "--histories", histories]
    result = run(*arguments, "--json", out)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["users"] for row in rows] == [2] * 8
    assert re.search(r"identical to Hugging Face generate: (yes|near-tie) \(", result.stdout)
    histories.write_text("u1 item-1\nu2 item-x\n")
    assert "test.txt: line 2: item 'item-x' is not in the bundle's catalogue" in one_line(run(*arguments))


def test_up_serves_until_interrupted(made: TestBundle) -> None:
    """A process that starts its own Redis, prints its address, serves, and leaves nothing behind on Ctrl-C."""
    with started("--bundle", made.root, "--targets", 2, "--port", 0) as process:
        announced = read_line(process)
        served = re.search(r"random is served at (127\.0\.0\.1:\d+)", announced)
        assert served, announced
        assert run("record", "u", "item-1", "--address", served[1]).exit_code == 0
        assert run("recommend", "u", "-k", 2, "--address", served[1]).exit_code == 0
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "draining" in errors
    assert "histories are kept in memory and lost at the end; --data DIR keeps them" in errors
    services = [int(number) for number in re.findall(r"process (\d+)", errors)]
    assert len(services) == 4
    assert not [number for number in services if alive(number)]
    assert "UNAVAILABLE" in one_line(run("info", "--address", served[1]), 69)


def test_up_keeps_histories_in_the_data_folder(made: TestBundle, tmp_path: Path) -> None:
    """They are there after Ctrl-C and another start."""
    data = tmp_path / "data"
    for expected in ("", "item-1\n"):
        with started("--bundle", made.root, "--drafts", 0, "--port", 0, "--data", data) as process:
            served = read_line(process).split()[-1]
            assert run("history", "u", "--address", served).stdout == expected
            run("record", "u", "item-1", "--address", served)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert f"histories are kept in {data}" in errors


def test_password_is_on_no_command_line(
    made: TestBundle, redis_server: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every service gets the URL, also that of another Redis than its own variable names, and none shows it."""
    monkeypatch.setenv("ATSPEED_TARGET_REDIS_URL", "redis://elsewhere:1/0")
    url = mended(redis_server).replace("redis://", "redis://default:hidden@")
    with redis.Redis.from_url(redis_server.url) as server:
        server.config_set("requirepass", "hidden")
    try:
        with LocalStack(made.root, redis_url=url) as stack:
            for service in stack.services:
                assert service.process is not None
                arguments = str(service.process.args)
                assert service.module in arguments
                assert "redis-url" not in arguments
                assert "hidden" not in arguments
                assert service.flags["redis-url"] == url
            assert run("record", "u", "item-1", "--address", stack.address).exit_code == 0
            backends = json.loads(run("info", "--address", stack.address).stdout)["backends"]
            assert {backend["name"]: backend["available"] for backend in backends}["redis"]
    finally:
        with redis.Redis.from_url(url) as server:
            server.config_set("requirepass", "")


def test_up_ends_with_a_service_that_ends(made: TestBundle) -> None:
    """After one service ends the rest is stopped, and the exit code is not 0."""
    with started("--bundle", made.root, "--port", 0) as process:
        read_line(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        os.kill(int(line.rpartition(" ")[2]), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended unexpectedly" in errors


def test_up_refuses_settings_that_cannot_start(made: TestBundle, tmp_path: Path) -> None:
    """No bundle; a port that is taken."""
    assert "manifest.json" in one_line(run("up", "--bundle", tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("up", "--bundle", made.root, "--port", taken.getsockname()[1])
    assert "orchestrator: did not start: cannot listen on 127.0.0.1:" in one_line(result)


def test_serving_commands_import_without_the_training_extra() -> None:
    """`up`, the demo and the checks run where neither torch nor onnx nor matplotlib is installed."""
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'faiss', 'safetensors', 'scipy', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import atspeed.cli.main, atspeed.cli.demo.demonstration, atspeed.benchmarks.lossless, atspeed.benchmarks.provenance\n"
        "import research.acceptance, research.eval_examples\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
