"""`atspeed bench gpu` in the dry run: it ends, and it says that graphs are not right where kernels compute nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from atspeed.benchmarks import gpu, gpu_correctness, gpu_passes
from atspeed.benchmarks.gpu_config import GpuConfig
from atspeed.benchmarks.results import Result
from tests.cuda.dry_run import counted, failing
from tests.cuda.shapes import TINY

CONFIG = GpuConfig(sizes=["tiny"], repeats=1, passes=((1000, 120), (40, 1)), shared=((100, 9), (7, 3)), pool_mb=64)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gpu, gpu_passes):
        monkeypatch.setattr(module, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(gpu_correctness, "_MODELS", {"qwen3": gpu_correctness._MODELS["qwen3"]})
    monkeypatch.setattr(gpu_passes, "_COPIED", 2**16)


def test_all_parts_run_on_cuda_and_captured_passes_are_replayed(tmp_path: Path) -> None:
    gpu.check(CONFIG)
    with counted() as made:
        rows = list(gpu.measure(CONFIG))
    assert not [row for row in rows if row["kind"] == "failed"]
    assert rows[-1] == {"kind": "end", "cut": []}
    correct = [row for row in rows if row["kind"] == "correct"]
    assert {(row["precision"], row["graph"]) for row in correct} == {
        (precision, graph) for precision in ("float32", "float16", "bfloat16") for graph in ("device", "host")
    }
    assert len(gpu.wrong(rows)) == len(correct)  # nothing was computed, and that is noticed
    graphs = [row["graph"] for row in rows if row["kind"] == "pass"]
    assert graphs == ["device"] * 2 + ["device, captured"] * 2 + ["host"] * 2
    assert len(made.replays) >= 2 * 3  # two warm-ups and a repetition of each
    Result(gpu.header(CONFIG), rows).write(tmp_path / "gpu.json")
    assert Result.read(tmp_path / "gpu.json").header["device"] == "cuda"


def test_a_device_that_breaks_leaves_the_rows_before_it() -> None:
    rows = []
    with failing("cudaLaunchKernel", after=2000):
        rows = list(gpu.measure(CONFIG))
    kinds = [row["kind"] for row in rows]
    assert kinds[0] == "correct"
    assert "failed" in kinds
    assert kinds[-1] == "end"
