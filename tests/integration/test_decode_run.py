"""`bench decode` and `bench overhead` with real services and engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from atspeed.benchmarks.decode_peers import built_for_genai
from atspeed.cli.main import app
from tests.bundles import TestBundle, write_bundle
from tests.catalogues import random_catalogue
from tests.edge import needs_envoy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    """Write a bundle and its target's checkpoint. onnxruntime-genai requires heads of a multiple of 8 dimensions."""
    root = tmp_path_factory.mktemp("decode")
    made = write_bundle(root / "bundle", random_catalogue(200, (12, 10, 8), seed=3), architecture="qwen3", seed=5)
    made.target.save_pretrained(root / "checkpoint")
    return made


def bench(made: TestBundle, arguments: str) -> Result:
    """Run a benchmark of the bundle."""
    return CliRunner().invoke(app, ["bench", *arguments.split(), "--bundle", str(made.root)])


def test_all_engines_measure_the_same_users(made: TestBundle, tmp_path: Path) -> None:
    """Lists are identical where that is promised, what is warm was kept, and what is cold was not."""
    peers = f"--checkpoint {made.root.parent}/checkpoint --genai --hf-users 2"
    asked = "--users 3 --min-items 8 -k 1 -k 6 --threads 1 --settle 1 --planner fixed"
    result = bench(made, f"decode {peers} {asked} --json {tmp_path}/decode.json --report {tmp_path}")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "decode.json").read_text())
    assert set(written["header"]["peers"]) == {"transformers", "onnxruntime-genai"}
    rows = {(row["engine"], row["mode"], row["k"], row["prefix"]): row for row in written["rows"]}
    assert len(rows) == len(written["rows"]) == 6 * 2 * 2 + 2 * 2
    for (engine, mode, _, prefix), row in rows.items():
        assert row["p50_ms"] > 0
        assert row["users"] == (3 if engine == "atspeed" else 2)
        if engine == "atspeed":
            assert (row["cached_tokens_mean"] > 0) == (prefix == "warm")
        if mode in {"strict", "perfect-plan", "constrained"} or (mode == "exact-sampling" and prefix == "warm"):
            assert row["identical"] + row["near_ties"] == row["users"]
        if mode == "perfect-plan":
            assert (row["target_passes_mean"], row["draft_passes_mean"], row["stages_ms"]["draft"]) == (1, 0, 0)
        assert row["target_passes_mean"] <= 3
        assert row["speedup_vs_hf"] > 0
    assert rows["atspeed", "strict", 6, "warm"]["target_passes_mean"] < 3
    assert written["header"]["settle"] == 1
    assert (tmp_path / "decode.md").exists()


def test_int8_lists_are_compared_with_int8_only(tmp_path: Path) -> None:
    """The checkpoint is another model. Lists equal target-only in every bit."""
    made = write_bundle(tmp_path / "bundle", random_catalogue(200, (12, 10, 8), seed=3), precision="int8")
    made.target.save_pretrained(tmp_path / "checkpoint")
    asked = f"--checkpoint {tmp_path}/checkpoint --users 3 --settle 1 --min-items 8 -k 6 --threads 1 --planner fixed"
    result = bench(made, f"decode {asked} --mode target-only --mode strict --json {tmp_path}/decode.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    own = [
        row for row in rows if row["engine"] == "atspeed" and (row["mode"], row["prefix"]) != ("target-only", "cold")
    ]
    assert {row["identical"] for row in own} == {3}
    assert [row["identical"] for row in rows if row["engine"] == "transformers"] == [None]
    assert all(row["speedup_vs_hf"] > 0 for row in rows)


def test_genai_is_built_without_the_checkpoints_generation_defaults(made: TestBundle, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    made.target.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.3, "top_k": 3}'
    )
    with built_for_genai(tmp_path / "checkpoint", tmp_path / "genai", threads=1) as built:
        search = json.loads((built / "genai_config.json").read_text())["search"]
    assert (search["do_sample"], search["temperature"], search["top_k"]) == (False, 1.0, 50)


def test_genai_needs_a_checkpoint(made: TestBundle) -> None:
    result = bench(made, "decode --genai")
    assert result.exit_code == 2
    assert "--genai needs --checkpoint" in result.output


def test_predictions_are_in_the_result(made: TestBundle, tmp_path: Path) -> None:
    asked = "--users 2 --mode strict -k 5 --prefix cold --no-perfect --threads 1 --settle 2"
    result = bench(made, f"decode {asked} --json {tmp_path}/decode.json")
    assert result.exit_code == 0, result.output
    [row] = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert row["prediction_error"]["target"] >= 0
    assert row["expected_passes_mean"] >= 1


def test_too_few_users_are_refused(made: TestBundle, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("1 item-1 item-2\n2 item-3 item-4\n")
    result = bench(made, f"decode --histories {tmp_path}/two.txt --settle 2")
    assert result.exit_code == 1
    assert "--settle 2: there are only 2 users with so many items" in result.stderr


@needs_envoy
def test_ways_of_a_list_are_measured(made: TestBundle, tmp_path: Path) -> None:
    result = bench(made, f"http --users 3 -k 4 --threads 1 --json {tmp_path}/http.json --report {tmp_path}")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "http.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["gRPC", "gRPC through Envoy", "HTTP/JSON"]
    assert rows[0]["ratio"] == 1
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in rows)
    assert f"K = 4: {rows[2]['ratio']:.2f}" in (tmp_path / "http.md").read_text()


def test_overhead_is_measured(made: TestBundle, tmp_path: Path) -> None:
    """Overhead of returning users, through Redis, is more than nothing and less than the whole."""
    asked = f"--users 2 -k 4 --threads 1 --json {tmp_path}/overhead.json --report {tmp_path}"
    result = bench(made, f"overhead {asked}")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert [(row["mode"], row["users"]) for row in rows] == [("target-only", 2), ("strict", 2)]
    for row in rows:
        assert 0 < row["added_p50_ms"] < row["p50_ms"]
        assert row["models_p50_ms"] > 0
        assert row["parts_ms"]["history"] > 0
    assert rows[0]["in_process_p50_ms"] > 0
    assert (tmp_path / "overhead.md").exists()
