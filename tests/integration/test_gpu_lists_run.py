"""`atspeed bench gpu-lists` from end to end on the CPU, and its probes of passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atspeed.benchmarks import gpu_lists
from atspeed.benchmarks.model_probe import bytes_per_second, bytes_read, probe_beams, probe_passes
from atspeed.cli.main import app
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.training.inflated_checkpoints import shape_of
from atspeed.training.inflation import SHAPES, ModelShape
from tests.bundles import TestBundle, random_model, write_run
from tests.catalogues import random_catalogue


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    return write_run(tmp_path_factory.mktemp("run"), random_catalogue(200, (12, 10, 8), seed=3), seed=5)


def test_all_measurements_are_written(made: TestBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = ModelShape(3, 96, 128, heads=8, kv_heads=4, head_dim=24, vocab_size=100)
    monkeypatch.setattr(
        gpu_lists, "SHAPES", {"large": large, "draft": ModelShape(2, 64, 64, heads=4, kv_heads=4, head_dim=12)}
    )
    folders = f"--bundle {made.root} --work {tmp_path}/work --out {tmp_path}/out --provider cpu --precision float32"
    sizes = "--size large+draft --users 2 --exact-users 3 --hf-users 1 -k 4 --threads 1"
    probes = "--beams 5 --prompt-tokens 11 --repeats 1"
    result = CliRunner().invoke(app, ["bench", "gpu-lists", *f"{folders} {sizes} {probes}".split()])
    assert result.exit_code == 0, result.output
    [file] = (tmp_path / "out").glob("gpu-lists-*.json")
    written = json.loads(file.read_text())
    assert written["header"]["device"] == "CPU"
    assert written["header"]["command"]
    rows = written["rows"]
    exact = [row for row in rows if row["kind"] == "exactness"]
    assert [(row["mode"], row["k"]) for row in exact] == [
        (mode, k) for k in (5, 20) for mode in ("target-only", "strict")
    ]
    assert all(row["identical"] + row["near_ties"] == row["users"] == 3 for row in exact)
    [size] = [row for row in rows if row["kind"] == "size"]
    assert size["bundle"] == "random-inflated-large-draft"
    assert size["inflated_from"]["target"] < size["parameters"]["target"]
    lists = {(row["engine"], row["mode"], row["prefix"]): row for row in rows if row["kind"] == "decode"}
    assert len(lists) == 3 * 2 + 1  # the perfect plan too, and Hugging Face once
    assert lists["atspeed", "strict", "warm"]["different"] == 0
    assert lists["transformers", "constrained", "cold"]["different"] == 0
    passes = [row for row in rows if row["kind"] == "pass"]
    assert [(row["cached_tokens"], row["new_tokens"]) for row in passes] == [
        (cached, new) for cached in gpu_lists.CACHED_TOKENS for new in gpu_lists.NEW_TOKENS
    ]
    [beams] = [row for row in rows if row["kind"] == "beams"]
    assert (beams["prompt_tokens"], beams["beams"], beams["codes"]) == (11, 5, 3)
    # Asked again, it does not inflate again.
    bundle = tmp_path / "work" / "large+draft-float32" / "bundle" / "manifest.json"
    config = gpu_lists.GpuConfig(provider="cpu", precision="float32", work=tmp_path / "work")
    before = bundle.stat().st_mtime_ns
    gpu_lists.inflated("large+draft", made.bundle, bundle.parents[1], config)
    assert bundle.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--provider", "cpu", "--size", "7b+9b"], "--size 7b+9b: must be TARGET or TARGET+DRAFT"),
        (["--provider", "cuda"], "--provider cuda: this torch has no CUDA; see deploy/gpu-setup.sh"),
    ],
)
def test_unusable_options_are_refused_at_once(
    made: TestBundle, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(
        app, ["bench", "gpu-lists", "--bundle", str(made.root), "--work", str(tmp_path), *options]
    )
    assert result.exit_code == 1
    assert message in result.stderr


class RecordingDecoder(Decoder):
    """Remembers what it was asked to read: positions, how many tokens each sees, how many are cached, rows."""

    def run(self, *arguments: Any) -> Any:
        _, positions, visible, past, rows, _ = arguments
        self.asked.append((positions.tolist(), visible.sum(axis=1).tolist(), past.shape[2], rows.tolist()))
        return super().run(*arguments)

    asked: list[tuple[list[int], list[int], int, list[int]]]


@pytest.fixture
def decoder(made: TestBundle) -> RecordingDecoder:
    recording = RecordingDecoder(made.bundle.model_path("target"), RuntimeOptions())
    recording.asked = []
    return recording


def test_beams_probe_makes_the_passes_of_a_search(decoder: RecordingDecoder) -> None:
    """Level by level: prompt, two levels of beams. At once: the same tokens in one pass, each seeing its ancestors alone."""
    row = probe_beams("x", decoder, 30, prompt=4, beams=3, codes=3, repeats=1)
    prompt, first, second = decoder.asked[:3]
    assert prompt == ([0, 1, 2, 3], [1, 2, 3, 4], 0, [3])
    assert first == ([4, 4, 4], [5, 5, 5], 4, [0, 1, 2])
    assert second == ([5, 5, 5], [6, 6, 6], 7, [0, 1, 2])
    at_once = decoder.asked[-1]
    assert at_once == ([0, 1, 2, 3, 4, 4, 4, 5, 5, 5], [1, 2, 3, 4, 5, 5, 5, 6, 6, 6], 0, list(range(3, 10)))
    assert row.level_by_level_ms > 0
    assert row.at_once_ms > 0


def test_passes_probe_reads_siblings_behind_cached_tokens(decoder: RecordingDecoder) -> None:
    rows = probe_passes("x", decoder, 30, 0.5, new=(1, 4), cached=(6,), repeats=1)
    assert decoder.asked[0] == ([6], [7], 6, [0])
    assert decoder.asked[-1] == ([6] * 4, [7] * 4, 6, [0, 1, 2, 3])
    assert [(row.new_tokens, row.cached_tokens) for row in rows] == [(1, 6), (4, 6)]
    assert all(row.times_read == pytest.approx(row.p50_ms / 0.5, abs=0.01) for row in rows)


def test_bytes_read_leave_out_embedding_and_norms(made: TestBundle) -> None:
    model = random_model("llama", 50, seed=1)
    read = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "norm" not in name)
    assert bytes_read(shape_of(model.config), 50, 4) == 4 * read
    assert bytes_per_second("cpu") > 1e6
    assert set(gpu_lists.SIZES) == {f"{size}+68m" for size in SHAPES if size in {"1.7b", "7b"}}
