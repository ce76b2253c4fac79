"""`atspeed bench gpu` from end to end on the CPU."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from atspeed.benchmarks import gpu, gpu_config, gpu_correctness, gpu_passes, model_probe
from atspeed.benchmarks.gpu_config import GpuConfig
from atspeed.benchmarks.made_models import make_large, small_checkpoint
from atspeed.benchmarks.probe_trees import HostPasses, PagedPasses, ProbeTree
from atspeed.cli.main import app
from atspeed.engine.errors import DeviceError
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.training.inflation import ModelShape

SHAPE = ModelShape(2, 64, 96, heads=4, kv_heads=2, head_dim=16, vocab_size=1200)
LENGTHS: dict[str, Any] = {"passes": ((40, 9), (17, 1), (40, 30), (1, 5)), "shared": ((40, 5), (3, 2))}
CONFIG = GpuConfig(provider="cpu", sizes=["small"], precision="float32", repeats=1, pool_mb=16)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size and passes that take no time, and one family of models."""
    for module in (gpu, gpu_passes):
        monkeypatch.setattr(module, "SHAPES", {"small": SHAPE})
    monkeypatch.setattr(gpu_correctness, "_MODELS", {"qwen3": gpu_correctness._MODELS["qwen3"]})
    monkeypatch.setattr(gpu_passes, "_COPIED", 2**16)
    monkeypatch.setattr(model_probe, "_COPIED_BYTES", 2**16)
    monkeypatch.setattr(gpu_config, "GpuConfig", partial(GpuConfig, **LENGTHS))


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """The exit code, the result file and the messages of a run."""
    file = tmp_path / "gpu.json"
    given = ["--provider", "cpu", "--size", "small", "--precision", "float32", "--repeats", "1", "--pool-mb", "16"]
    done = CliRunner().invoke(app, ["bench", "gpu", *given, "--json", str(file), "--threads", "1", *options])
    return done.exit_code, json.loads(file.read_text()), done.stderr


def test_a_whole_run_checks_first_and_measures_both_graphs(tmp_path: Path) -> None:
    code, written, errors = run(tmp_path)
    assert code == 0, errors
    rows = written["rows"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    assert kinds == ["correct", "machine", "made", "loaded", "pass", "shared", "blocks", "end"]
    correct = [row for row in rows if row["kind"] == "correct"]
    assert {(row["precision"], row["graph"]) for row in correct} == {
        (precision, graph) for precision in ("float32", "float16") for graph in ("device", "host")
    }
    assert all(row["right"] and max(row["worst"]) < 1e-4 for row in correct if row["precision"] == "float32")
    passes = Counter(row["graph"] for row in rows if row["kind"] == "pass")
    assert passes == {"device": gpu_passes._EAGER, "host": len(LENGTHS["passes"])}
    assert all(row["p50_ms"] > 0 and row["read_ms"] > 0 for row in rows if row["kind"] == "pass")
    assert rows[-1] == {"kind": "end", "cut": []}
    assert written["header"]["benchmark"] == "gpu"
    assert written["header"]["minutes"] == 4


def test_a_run_without_time_says_what_it_left_out(tmp_path: Path) -> None:
    code, written, _ = run(tmp_path, "--minutes", "0")
    assert code == 0
    assert written["rows"] == [{"kind": "end", "cut": ["correctness", "machine", "passes of small"]}]


def test_every_row_is_there_before_the_next_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is taken away leaves the rows that there are."""

    def taken_away(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_passes, "machine", taken_away)
    code, written, _ = run(tmp_path)
    assert code != 0
    assert [row["kind"] for row in written["rows"]] == ["correct"] * 4


def test_a_part_that_fails_is_told_and_the_others_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: GpuConfig) -> Any:
        raise DeviceError("the device is gone\nand more")

    monkeypatch.setattr(gpu, "correctness", broken)
    code, written, errors = run(tmp_path)
    assert code == 1
    assert written["rows"][0] == {"kind": "failed", "part": "correctness", "error": "the device is gone"}
    assert written["rows"][-1]["kind"] == "end"
    assert "not right on cpu: correctness: the device is gone" in " ".join(errors.split())


@pytest.mark.parametrize("worst", [0.01, float("nan")])
def test_a_graph_that_is_not_right_is_named(worst: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = gpu_correctness._scores
    monkeypatch.setattr(
        gpu_correctness,
        "_scores",
        lambda passes: [one + (worst if type(passes[0]).__name__ == "PagedPasses" else 0) for one in scores(passes)],
    )
    told = gpu.wrong(list(gpu_correctness.correctness(CONFIG)))
    assert any("qwen3, float32, graph of the device" in line for line in told)
    assert not any("graph of the host" in line for line in told)


def test_made_models_have_the_weights_of_their_shape() -> None:
    """The file has as many bytes as the checkpoint would have; passes are finite, and every table is one of its own."""
    made = make_large("qwen3", SHAPE, "float32", seed=1)
    checkpoint = small_checkpoint("qwen3", SHAPE, seed=1)
    bytes_of = {name: len(content) for name, content in made.device.weights.items()}
    needed = 4 * sum(weight.numel() for weight in checkpoint.parameters())
    (size,) = bytes_of.values()
    assert needed <= size < needed + 4096 * 100
    tree = ProbeTree.grown(SHAPE.vocab_size or 0, 9, 5)
    found = HostPasses(made.on_host(RuntimeOptions()), tree).run(0, 14)
    other = PagedPasses(made.on_device(RuntimeOptions(), 16), tree).run(0, 14)
    np.testing.assert_allclose(found, other, atol=1e-5)
    assert found.std() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--provider", "cpu", "--size", "9b"], "--size 9b: must be one of small"),
        (["--provider", "cuda"], "--provider cuda: this onnxruntime has no CUDA; see deploy/gpu-setup.sh"),
    ],
)
def test_unusable_options_are_refused_at_once(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    done = CliRunner().invoke(app, ["bench", "gpu", *options])
    assert done.exit_code == 1
    assert message in done.stderr
