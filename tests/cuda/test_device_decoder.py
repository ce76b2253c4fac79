"""Calls of CUDA of passes with keys and values on the device: copies, launches, replays; and a device that is full or fails."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest

from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.errors import BundleError, DeviceError
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder, KvShape
from atspeed.engine.model.device_pass import PagedInput, buckets
from atspeed.engine.model.token_tree import PathPass
from atspeed.training.export import write_graph
from tests.bundles import random_model
from tests.cuda.dry_run import OUT_OF_MEMORY, UNFUSED_ATTENTION, Place, counted, device_bytes, device_of, failing

LAYERS, KV_HEADS, HEAD_DIM, COLUMNS, PAGE = 2, 2, 128, 768, 4
CUDA = RuntimeOptions(provider="cuda")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Two layers whose heads are as wide as those of large models."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 2048, "initializer_range": 0.02}
    heads = {"num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    model = random_model("llama", 4000, 0, **shape, **heads)
    write_graph(model, folder, range(100, 100 + COLUMNS), "float16")
    return ModelFiles.read(folder / "device.onnx")


def opened(files: ModelFiles, pool_bytes: int = 2**28) -> DeviceDecoder:
    return DeviceDecoder(files, CUDA, KvShape(LAYERS, KV_HEADS, HEAD_DIM), page_tokens=PAGE, pool_bytes=pool_bytes)


@pytest.fixture(scope="module")
def decoder(files: ModelFiles) -> DeviceDecoder:
    made = opened(files)
    made.capture(2, 2048, trees=64)
    return made


def tree(cached: int, new: int) -> PagedInput:
    """A chain of tokens behind others; the dry run computes nothing, so any slots do."""
    order = np.arange(new)
    step = PathPass(order % 5, order + cached, order, order + cached + 1, np.zeros((new, 2), dtype=np.int32))
    return PagedInput(step, np.arange(2, 2 + cached + new))


def scored(trees: Sequence[PagedInput]) -> int:
    return sum(len(one.step.rows) for one in trees)


@pytest.mark.parametrize(
    "trees",
    [
        *([tree(cached, new)] for cached, new in ((1000, 40), (1000, 240), (0, 1), (100, 120), (1500, 512), (10, 300))),
        [tree(100, 40)] * 4,
        [tree(1000, 20), tree(1600, 60), tree(1800, 50)],
        [tree(90 + 7 * n, 6) for n in range(13)],
        [tree(n, 1) for n in range(64)],
    ],
    ids=lambda trees: f"{len(trees)}x{len(trees[0].slots)}",
)
def test_a_pass_that_fits_a_bucket_is_one_launch_one_copy_in_one_back_and_one_wait(
    decoder: DeviceDecoder, trees: Sequence[PagedInput]
) -> None:
    """Replays of a graph hold for one tree and for several."""
    with counted() as made:
        decoder.run(trees)
    assert (made.launches, len(made.replays)) == (1, 1)
    assert not made.allocated
    assert not made.pinned
    [copied_in], [copied_back] = made.to_device, made.to_host
    assert copied_in.source is copied_back.destination is Place.PINNED
    assert copied_in.bytes <= 100_000
    assert copied_back.bytes == 4 * COLUMNS * scored(trees)
    assert made.synchronisations == {"cudaStreamSynchronize": 1}


@pytest.mark.parametrize(
    "trees", [[tree(2500, 40)], [tree(100, 600)], [tree(100 + 14 * n, 20) for n in range(64)], [tree(1000, 300)] * 2]
)
def test_other_passes_run_eagerly_without_keys_and_values_of_the_host(
    decoder: DeviceDecoder, trees: Sequence[PagedInput]
) -> None:
    """64 open trees of 100 to 1,000 tokens in one pass, too."""
    decoder.run(trees)
    with counted() as made:
        decoder.run(trees)
    assert not made.replays
    assert made.launches <= 18 * LAYERS + 20
    assert not made.of(*UNFUSED_ATTENTION)
    assert not made.allocated
    [copied_in], [copied_back] = made.to_device, made.to_host
    longest, new = max(len(one.slots) for one in trees), max(len(one.step.tokens) for one in trees)
    # Six numbers of 8 bytes a token, and a slot of 4 for each place, padded to the longest.
    assert copied_in.bytes <= len(trees) * (48 * (new + 8) + 4 * (longest + 64)) + 7 * 256
    assert copied_back.bytes == 4 * COLUMNS * scored(trees)
    assert made.synchronisations == {"cudaStreamSynchronize": 1}


def test_graphs_are_captured_once_whatever_thread_asks_for_passes(files: ModelFiles) -> None:
    """onnxruntime keeps graphs by thread: a thread of its own would capture again, in a request."""
    decoder = opened(files)
    decoder.capture(2, 200, trees=1)
    with counted() as made, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda new: decoder.run([tree(100, new)]), (3, 20, 3, 60)))
    assert not made.captures
    assert (made.launches, len(made.replays)) == (4, 4)


def test_passes_and_pages_of_a_served_model_go_on_while_another_one_is_captured(files: ModelFiles) -> None:
    """A capture forbids the calls of all other threads: without an order, both would fail."""
    served, loaded = opened(files), opened(files)
    stop = Event()

    def serve() -> int:
        made = 0
        while not stop.is_set():
            served.run([tree(100 + made % 7, 20 + made % 50)])
            served.write_pages([1, 2], served.read_pages([3, 4]))
            made += 1
        return made

    with ThreadPoolExecutor(1) as threads:
        serving = threads.submit(serve)
        with counted() as made:
            loaded.capture(2, 500, trees=1)
        stop.set()
        assert serving.result() > 0
    assert len(made.captures) == len(list(buckets(2, 500, 1)))


def test_pages_go_to_the_host_and_back_as_they_are_and_nothing_else(decoder: DeviceDecoder) -> None:
    pages, one = list(range(25)), PAGE * KV_HEADS * HEAD_DIM * 2  # bytes of a page's keys in a layer
    with counted() as made:
        blocks = decoder.read_pages(pages)
    assert sorted(copy.bytes for copy in made.to_host) == [one * len(pages)] * 2 * LAYERS
    assert sum(copy.bytes for copy in made.to_device) == 8 * PAGE * len(pages)
    with counted() as made:
        decoder.write_pages(pages, blocks)
    assert sum(copy.bytes for copy in made.to_device) == one * len(pages) * 2 * LAYERS + 8 * PAGE * len(pages)
    assert not made.to_host
    # In place: the pools themselves stay where they are.
    assert all(copy.bytes <= one * len(pages) for copy in made.on_device)


def test_every_bucket_is_captured_once(files: ModelFiles) -> None:
    decoder = opened(files)
    with counted() as made:
        decoder.capture(2, 2048, trees=8)
    assert len(made.captures) == len(list(buckets(2, 2048, 8)))
    with counted() as made:
        decoder.capture(2, 2048, trees=8)
    assert not made.captures


def test_what_does_not_fit_the_device_is_refused_with_the_numbers(files: ModelFiles) -> None:
    refusal = r"kv_device_mb: keys and values of \d+ tokens take 4096 MiB\. cuda: no room for 1024\.0 MiB"
    with device_of(memory=device_bytes() + (300 << 20)), pytest.raises(BundleError, match=refusal):
        opened(files, pool_bytes=4 << 30)
    with (
        device_of(memory=1 << 20),
        pytest.raises(BundleError, match=r"cannot load its \d+ MiB of weights on the device"),
    ):
        opened(files)


@pytest.mark.parametrize("function", ["cudaLaunchKernel", "cudaMemcpyAsync", "cudaStreamSynchronize"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_device_that_fails_in_mid_pass_is_a_device_error(files: ModelFiles, function: str, after: int) -> None:
    decoder = opened(files)
    decoder.run([tree(10, 3)])
    with failing(function, after=0 if function == "cudaStreamSynchronize" else after):
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"a pass of PassShape.* failed on the device|CUDA error 700"):
                decoder.run([tree(10, 3)])
    decoder.run([tree(10, 3)])


def test_a_graph_that_cannot_be_launched_is_a_device_error(files: ModelFiles) -> None:
    decoder = opened(files)
    decoder.capture(2, 100, trees=1)
    with failing("cudaGraphLaunch"), pytest.raises(DeviceError, match=r"a pass of PassShape.* failed on the device"):
        decoder.run([tree(10, 3)])


def test_buckets_that_do_not_fit_the_device_are_refused_at_the_start_with_the_numbers(files: ModelFiles) -> None:
    decoder = opened(files)
    refusal = r"1 trees with \d+ new tokens behind \d+ places do not fit the device beside 256 MiB .*kv_device_mb"
    with failing("cudaMalloc", error=OUT_OF_MEMORY), pytest.raises(BundleError, match=refusal):
        decoder.capture(2, 2048, trees=1)


def test_half_of_the_free_memory_is_for_keys_and_values_by_default(files: ModelFiles) -> None:
    with device_of(memory=device_bytes() + (400 << 20)):
        decoder = DeviceDecoder(files, CUDA, KvShape(LAYERS, KV_HEADS, HEAD_DIM), page_tokens=PAGE)
    assert 100 << 20 < decoder.device_bytes <= 200 << 20
