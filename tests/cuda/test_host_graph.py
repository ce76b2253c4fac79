"""The host's graph on CUDA, with keys and values in the host's memory: what one pass asks for. docs/gpu.md has it as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from atspeed.engine.bundle.manifest import Precision
from atspeed.training.inflation import SHAPES, ModelShape
from tests.cuda.dry_run import FUSED_ATTENTION, UNFUSED_ATTENTION, Counts, Place
from tests.cuda.passes import counted_pass, placement, profiled, tree_pass
from tests.cuda.shapes import TINY, open_shape, write_shape

FAMILIES = ("llama", "qwen2", "qwen3")
# In float32 the host's graph is made for CPUs: its sums have one order.
PRECISIONS: Sequence[Precision] = ("float16",)


def attentions(made: Counts) -> tuple[int, int]:
    """Number of (fused, unfused) attentions."""
    return made.of(*FUSED_ATTENTION), made.of(*UNFUSED_ATTENTION)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_but_shape_arithmetic_runs_on_the_device(family: str, precision: Precision, tmp_path: Path) -> None:
    with profiled(tmp_path / "profile"):
        decoder = open_shape(write_shape(tmp_path, TINY, precision, family))
    tree_pass(decoder, 100, 20)
    placed = placement(decoder._session)
    assert {op: number for (provider, op), number in placed.items() if provider == "CPU"} == {"Concat": 3}
    assert not [op for _, op in placed if op.startswith("Memcpy")]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_keys_and_values_come_from_pageable_memory_in_each_pass(
    family: str, precision: Precision, tmp_path: Path
) -> None:
    decoder = open_shape(write_shape(tmp_path, TINY, precision, family))
    cached, new = 1000, 120
    made = counted_pass(decoder, cached, new)
    one = TINY.kv_heads * TINY.head_dim * decoder.dtype.itemsize  # bytes of a token's keys in a layer
    assert len(made.to_device) == len(made.to_host) + 2 == 2 * TINY.layers + 4
    assert [copy.bytes for copy in made.to_device].count(cached * one) == 2 * TINY.layers
    assert [copy.bytes for copy in made.to_host].count(new * one) == 2 * TINY.layers
    assert {copy.source for copy in made.to_device} == {copy.destination for copy in made.to_host} == {Place.PAGEABLE}
    assert made.synchronisations == {"cudaStreamSynchronize": 2, "cudaDeviceSynchronize": 2}
    assert not made.allocated
    assert not made.replays


@pytest.mark.parametrize(("cached", "new"), [(1000, 120), (1000, 121), (0, 40), (37, 3), (0, 1)])
def test_attention_is_fused_only_at_lengths_that_are_multiples_of_four(cached: int, new: int, tmp_path: Path) -> None:
    grouped = open_shape(write_shape(tmp_path / "f16", TINY, "float16"))
    fits = (cached + new) % 4 == 0
    assert attentions(counted_pass(grouped, cached, new)) == ((2, 0) if fits else (0, 2))
    assert attentions(counted_pass(grouped, cached, new, batch=3)) == ((2, 0) if fits else (0, 2))


def test_the_head_takes_seven_kernels_for_its_normalizer_and_needs_cudnn(tmp_path: Path) -> None:
    made = counted_pass(open_shape(write_shape(tmp_path, TINY, "float16")), 0, 40)
    assert made.of("cudnn") == made.functions()["cudnnReduceTensor"] == 2
    assert made.of(f"m={TINY.vocab_size} ") == 1  # the product is over the whole vocabulary
    tail = ("cudnnReduceTensor", "OP_Sub<float", "OP_Exp<float", "_FixExp", "OP_Log<float", "OP_Add<float")
    assert made.of(*tail) == 7


LAUNCHES = [
    # kernels of a pass of 120 tokens behind 1,000, of 121, and copies on the device
    pytest.param("1.7b", 579, 663, 56, id="1.7b"),
    pytest.param("7b", 595, 755, 64, id="7b"),
]


@pytest.mark.parametrize(("name", "fused", "unfused", "copies"), LAUNCHES)
def test_launches_of_a_pass(name: str, fused: int, unfused: int, copies: int, tmp_path: Path) -> None:
    """Two depths at full width; layers are alike, so that a third depth follows."""
    shape = SHAPES[name]
    depths = []
    for layers in (1, 2):
        decoder = open_shape(write_shape(tmp_path / str(layers), replace(shape, layers=layers), "float16"))
        depths.append([_numbers(counted_pass(decoder, 1000, new)) for new in (120, 121)])
    assert _at_depth(shape, *depths) == [(fused, copies), (unfused, copies)]


@pytest.mark.long
@pytest.mark.parametrize(("name", "fused", "unfused", "copies"), LAUNCHES)
def test_launches_of_a_pass_at_full_depth(name: str, fused: int, unfused: int, copies: int, tmp_path: Path) -> None:
    decoder = open_shape(write_shape(tmp_path, SHAPES[name], "float16"))
    assert [_numbers(counted_pass(decoder, 1000, new)) for new in (120, 121)] == [(fused, copies), (unfused, copies)]


def _numbers(made: Counts) -> tuple[int, int]:
    return made.launches, len(made.on_device)


def _at_depth(shape: ModelShape, one: list[tuple[int, int]], two: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Continue the counts of one and two layers to those of the shape."""
    return [
        (a + (b - a) * (shape.layers - 1), c + (d - c) * (shape.layers - 1))
        for (a, c), (b, d) in zip(one, two, strict=True)
    ]
