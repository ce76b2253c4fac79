"""`bench decode` and `bench overhead`, small: real services, Hugging Face generate, onnxruntime-genai, one random checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atspeed.benchmarks.decode_peers import built_for_genai
from atspeed.cli.main import app
from tests.bundles import TestBundle, random_catalogue, write_bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    """A bundle and, beside it, its target's checkpoint. onnxruntime-genai wants heads of a multiple of 8 dimensions."""
    root = tmp_path_factory.mktemp("decode")
    made = write_bundle(root / "bundle", random_catalogue(200, (12, 10, 8), seed=3), architecture="qwen3", seed=5)
    made.target.save_pretrained(root / "checkpoint")
    return made


def test_all_engines_are_asked_about_the_same_users(made: TestBundle, tmp_path: Path) -> None:
    """Lists are identical where that is promised, what is warm was kept, and what is cold was not."""
    command = [
        "bench",
        "decode",
        "--bundle",
        str(made.root),
        "--checkpoint",
        str(made.root.parent / "checkpoint"),
        "--genai",
    ]
    asked = ["--users", "3", "--hf-users", "2", "--min-items", "8", "-k", "1", "-k", "6"]
    asked += ["--threads", "1", "--settle", "1", "--planner", "fixed"]
    files = ["--json", str(tmp_path / "decode.json"), "--report", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, *asked, *files])
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


def test_lists_of_an_int8_target_are_compared_with_its_own_alone(tmp_path: Path) -> None:
    """Its checkpoint is another model; what is identical to target-only is so in every bit."""
    made = write_bundle(tmp_path / "bundle", random_catalogue(200, (12, 10, 8), seed=3), precision="int8")
    made.target.save_pretrained(tmp_path / "checkpoint")
    peer = [
        "--checkpoint",
        str(tmp_path / "checkpoint"),
        "--users",
        "3",
        "--settle",
        "1",
        "--min-items",
        "8",
        "-k",
        "6",
    ]
    modes = ["--mode", "target-only", "--mode", "strict", "--threads", "1", "--planner", "fixed"]
    files = ["--json", str(tmp_path / "decode.json")]
    result = CliRunner().invoke(app, ["bench", "decode", "--bundle", str(made.root), *peer, *modes, *files])
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
    result = CliRunner().invoke(app, ["bench", "decode", "--bundle", str(made.root), "--genai"])
    assert result.exit_code == 2
    assert "--genai needs --checkpoint" in result.output


def test_what_was_predicted_stands_beside_what_was_measured(made: TestBundle, tmp_path: Path) -> None:
    command = [
        "bench",
        "decode",
        "--bundle",
        str(made.root),
        "--users",
        "2",
        "--mode",
        "strict",
        "-k",
        "5",
        "--prefix",
        "cold",
        "--no-perfect",
    ]
    asked = ["--threads", "1", "--settle", "2", "--json", str(tmp_path / "decode.json")]
    result = CliRunner().invoke(app, [*command, *asked])
    assert result.exit_code == 0, result.output
    [row] = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert row["prediction_error"]["target"] >= 0
    assert row["expected_passes_mean"] >= 1


def test_there_have_to_be_users_left(made: TestBundle, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("1 item-1 item-2\n2 item-3 item-4\n")
    command = ["bench", "decode", "--bundle", str(made.root), "--histories", str(tmp_path / "two.txt"), "--settle", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "--settle 2: there are only 2 users with so many items" in result.stderr


def test_what_the_services_add_is_measured(made: TestBundle, tmp_path: Path) -> None:
    """Returning users, through Redis: what is added is more than nothing and less than the whole."""
    command = ["bench", "overhead", "--bundle", str(made.root), "--users", "2", "-k", "4", "--threads", "1"]
    result = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "overhead.json"), "--report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert [(row["mode"], row["users"]) for row in rows] == [("target-only", 2), ("strict", 2)]
    for row in rows:
        assert 0 < row["added_p50_ms"] < row["p50_ms"]
        assert row["models_p50_ms"] > 0
        assert row["parts_ms"]["history"] > 0
    assert rows[0]["in_process_p50_ms"] > 0
    assert (tmp_path / "overhead.md").exists()
