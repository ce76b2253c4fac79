"""The graph for devices at the shapes of large models: kernels of a pass, by family, number format and length."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from atspeed.engine.bundle.manifest import Precision
from atspeed.training.inflation import SHAPES
from tests.cuda.dry_run import FUSED_ATTENTION, UNFUSED_ATTENTION
from tests.cuda.passes import counted_paged, paged_inputs, placement, profiled
from tests.cuda.shapes import TINY, open_device_shape, write_shape

# The kernels that the times of docs/gpu.md are predicted from. 7B has a key for every head.
ROOFLINE = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "roofline.py"))
PREDICTED: dict[str, tuple[int, int]] = ROOFLINE["KERNELS"]
MOST_OF_A_LAYER, MOST_BESIDE = 18, 20


def kernels(name: str, family: str, precision: Precision, folder: Path) -> tuple[int, int]:
    """Launches of an eager pass of 120 tokens behind 1,000: of a layer, and beside the layers.

    Two depths at full width; layers are alike, so that every depth follows.
    """
    shape, launches = SHAPES.get(name, TINY), []
    for layers in (1, 2):
        cut = replace(shape, layers=layers)
        decoder = open_device_shape(write_shape(folder / str(layers), cut, precision, family), cut)
        launches.append(counted_paged(decoder, (1000, 120)).launches)
    return launches[1] - launches[0], 2 * launches[0] - launches[1]


@pytest.mark.parametrize(
    ("name", "family", "precision", "expected"),
    [
        *((name, "llama", "float16", found) for name, found in PREDICTED.items()),
        ("tiny", "llama", "float32", (18, 17)),
        ("tiny", "llama", "bfloat16", (17, 20)),
        ("tiny", "qwen2", "float16", (18, 20)),  # biases of queries, keys and values
        ("tiny", "qwen2", "float32", (19, 17)),
        ("tiny", "qwen3", "float16", (18, 20)),  # norms of queries and of keys, in one kernel
        ("tiny", "qwen3", "float32", (19, 17)),
    ],
)
def test_kernels_of_a_layer_and_beside_the_layers(
    name: str, family: str, precision: Precision, expected: tuple[int, int], tmp_path: Path
) -> None:
    layer, beside = found = kernels(name, family, precision, tmp_path)
    assert found == expected
    assert layer <= MOST_OF_A_LAYER + (precision == "float32")
    assert beside <= MOST_BESIDE


def test_the_predicted_pass_of_7b_is_below_six_milliseconds() -> None:
    """Arithmetic with the kernels above, for an H200."""
    assert ROOFLINE["Pass"]("7b", 1000, 120).seconds <= 6e-3


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_attention_is_fused_at_every_length_and_nothing_needs_cudnn(
    family: str, precision: Precision, tmp_path: Path
) -> None:
    decoder = open_device_shape(write_shape(tmp_path, TINY, precision, family), TINY)
    for new in (*range(1, 18), *range(19, 513, 29), 512):
        for trees in ([(0, new)], [(1000 - new, new)], [(new, 3), (2 * new, new)]):
            made = counted_paged(decoder, *trees)
            assert (made.of(*FUSED_ATTENTION), made.of(*UNFUSED_ATTENTION)) == (TINY.layers, 0), trees
            assert not made.of("cudnn")


def test_every_node_but_shape_arithmetic_runs_on_the_device(tmp_path: Path) -> None:
    path = write_shape(tmp_path, TINY, "float16")
    with profiled(tmp_path / "profile"):
        decoder = open_device_shape(path, TINY)
    decoder.run(paged_inputs(decoder, [(100, 20)]))
    placed = placement(decoder._session)
    on_cpu = {op for provider, op in placed if provider == "CPU"}
    assert on_cpu <= {"Concat", "Squeeze"}
    assert not [op for _, op in placed if op.startswith("Memcpy")]


@pytest.mark.long
def test_launches_at_full_depth(tmp_path: Path) -> None:
    shape, (layer, beside) = SHAPES["7b"], PREDICTED["7b"]
    decoder = open_device_shape(write_shape(tmp_path, shape, "float16"), shape, pool_bytes=4 << 30)
    assert counted_paged(decoder, (1000, 120)).launches == layer * shape.layers + beside
