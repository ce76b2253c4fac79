"""A decoder on a device: passes over token trees of any lengths, KV in pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.bundle.manifest import Head
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.errors import BundleError, DeviceError, NoNumbersError
from atspeed.engine.kv.page_pool import PagePool
from atspeed.engine.model.batch_decoder import TreeOutput
from atspeed.engine.model.capture_lock import DEVICE
from atspeed.engine.model.decoder import (
    Decoder,
    RuntimeOptions,
    check_contract,
    check_provider,
    graph_specs,
    open_session,
)
from atspeed.engine.model.device_graph import FREE_SLOTS_FROM, SCORES, device_inputs, device_outputs
from atspeed.engine.model.device_pass import BoundPass, PagedInput, PassShape, buckets
from atspeed.engine.model.device_pools import DevicePools, host_dtype
from atspeed.engine.model.device_selection import RowSelection
from atspeed.engine.model.device_selector import DeviceSelector
from atspeed.engine.model.device_stream import DeviceStream, device_stream
from atspeed.engine.model.free_memory import default_pool_bytes
from atspeed.engine.model.provider import Provider
from atspeed.engine.search.scoring import Evaluation

# Shapes whose buffers are kept, besides those of CUDA graphs. Chosen, not measured.
_KEPT_SHAPES = 32
Made = TypeVar("Made")


@dataclass(frozen=True)
class KvShape:
    """The shape of a decoder's keys and values.

    Attributes:
        layers: number of layers.
        kv_heads: heads of keys and values.
        head_dim: values per head.
    """

    layers: int
    kv_heads: int
    head_dim: int


class DeviceDecoder:
    """A loaded device graph with the pools of its keys and values. Passes run one at a time, from any thread.

    Raises BundleError when the file cannot be loaded, when its graph breaks the contract, when the provider is not available, or
    when the model or its pools do not fit the device.

    Args:
        files: the device graph and its weights.
        options: the options of onnxruntime.
        shape: the shape of keys and values.
        page_tokens: tokens of a page.
        pool_bytes: bytes of the pools; None for a share of what is free beside the weights.

    Attributes:
        path: the device graph, for messages.
        options: the options of onnxruntime.
        layers, kv_heads, head_dim: the shape of keys and values.
        kv_dtype: their number format.
        dtype: numpy's number format of their bytes.
        columns: code tokens.
        pages: the books of the pools' pages.
        stream: the order of passes and of what follows them.
    """

    def __init__(
        self,
        files: ModelFiles,
        options: RuntimeOptions,
        shape: KvShape,
        *,
        page_tokens: int,
        pool_bytes: int | None = None,
    ) -> None:
        self.path = path = files.path
        self.layers, self.kv_heads, self.head_dim = shape.layers, shape.kv_heads, shape.head_dim
        self.options = options
        self._device, self._page_tokens = options.provider, page_tokens
        self.stream = _stream(path, options.provider)
        graphs = {"enable_cuda_graph": "1"} if options.provider == "cuda" else {}
        self._session = open_session(files, options, {**self.stream.provider_options, **graphs})
        inputs, outputs = graph_specs(self._session)
        head: Head = "vocab" if SCORES["vocab"] in outputs else "codes"
        dtype = inputs["key_pool.0"].dtype if "key_pool.0" in inputs else "float32"
        self.kv_dtype, self.dtype = dtype, host_dtype(dtype)
        scores = SCORES[head]
        self.columns = int(outputs[scores].fixed[1] or 0) if scores in outputs else 0
        sizes = (shape.layers, shape.kv_heads, shape.head_dim, dtype)
        check_contract(path, "input", inputs, device_inputs(*sizes))
        check_contract(path, "output", outputs, device_outputs(*sizes, self.columns, head))
        self._scores = (scores, self.columns)
        width = shape.kv_heads * shape.head_dim
        page_bytes = 2 * shape.layers * page_tokens * width * self.dtype.itemsize
        pages = (default_pool_bytes(options.provider) if pool_bytes is None else pool_bytes) // page_bytes
        if not pages:
            raise BundleError(
                f"kv_device_mb: {(pool_bytes or 0) / 2**20:.0f} MiB hold no page of {page_tokens} tokens, "
                f"which takes {page_bytes / 2**20:.2f} MiB"
            )
        self._pools = DevicePools(shape.layers, width, dtype, FREE_SLOTS_FROM + pages * page_tokens, options)
        self.pages = PagePool(pages, page_bytes, self._zero)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._graphs: dict[PassShape, BoundPass] = {}
        self._bound: OrderedDict[PassShape, BoundPass] = OrderedDict()

    @property
    def device_bytes(self) -> int:
        """Return the bytes of keys and values on the device."""
        return self._pools.nbytes

    def empty_kv(self, tokens: int) -> KvArray:
        """Return uninitialised KV [layers, 2, tokens, kv_heads, head_dim] on the host."""
        return np.empty((self.layers, 2, tokens, self.kv_heads, self.head_dim), dtype=self.dtype)

    def slots(self, pages: Sequence[int], tokens: int) -> Int64:
        """Return the slots of the first `tokens` places of a tree with these pages, int64 [tokens]."""
        first = FREE_SLOTS_FROM + np.asarray(pages, dtype=np.int64) * self._page_tokens
        return (first[:, None] + np.arange(self._page_tokens)).reshape(-1)[:tokens]

    def run(self, trees: Sequence[PagedInput]) -> list[TreeOutput]:
        """Make one pass over one tree or more, of any lengths. Keys and values stay on the device. Raises DeviceError."""
        counts = [len(tree.step.rows) for tree in trees]
        scores = self._on_thread(lambda: self._enqueued(trees).read(sum(counts)))
        normalizer = np.zeros(len(scores), dtype=np.float32)  # scores are normalised, or their rule does not ask
        ends = np.cumsum(counts)[:-1]
        return [TreeOutput(*parts) for parts in zip(np.split(scores, ends), np.split(normalizer, ends), strict=True)]

    def run_and_select(
        self, trees: Sequence[PagedInput], selector: DeviceSelector, rows: Sequence[RowSelection]
    ) -> list[Evaluation | NoNumbersError]:
        """Make a pass and select the best children of its rows on the device; the scores stay there. Raises DeviceError."""
        return self._on_thread(lambda: selector.select(self._enqueued(trees).scores, rows))

    def capture(self, depth: int, longest: int, trees: int) -> None:
        """Capture the CUDA graphs of all buckets on a GPU; nothing on a CPU.

        Raises BundleError when a bucket does not fit the device.

        Args:
            depth: ancestors of a token.
            longest: tokens of the longest tree.
            trees: trees of the largest batch.
        """
        if self._device != "cuda":
            return
        for shape in buckets(depth, longest, trees):
            if shape in self._graphs:
                continue
            try:
                self._on_thread(partial(self._capture, shape), DEVICE.capturing)
            except DeviceError as error:
                raise BundleError(
                    f"{self.path}: {shape.batch} trees with {shape.new} new tokens behind {shape.capacity} places do not fit "
                    f"the device beside {self._pools.nbytes / 2**20:.0f} MiB of keys and values (kv_device_mb): {error}"
                ) from error

    def read_pages(self, pages: Sequence[int]) -> list[KvArray]:
        """Copy pages to the host: read-only blocks [layers, 2, page_tokens, kv_heads, head_dim]. Raises DeviceError."""
        rows = self._pools.read(self.slots(pages, len(pages) * self._page_tokens))
        shape = (self.layers, 2, len(pages), self._page_tokens, self.kv_heads, self.head_dim)
        blocks = [np.array(block, order="C") for block in np.moveaxis(rows.reshape(shape), 2, 0)]
        for block in blocks:
            block.flags.writeable = False
        return blocks

    def write_pages(self, pages: Sequence[int], blocks: Sequence[KvArray]) -> None:
        """Copy blocks [layers, 2, page_tokens, kv_heads, head_dim] of the host into pages. Raises DeviceError."""
        rows = np.concatenate(blocks, axis=2).reshape(self.layers, 2, -1, self.kv_heads * self.head_dim)
        self._pools.write(self.slots(pages, rows.shape[2]), rows)

    def _zero(self, pages: Sequence[int]) -> None:
        self._pools.zero(self.slots(pages, len(pages) * self._page_tokens))

    def _on_thread(
        self, work: Callable[[], Made], block: Callable[[], AbstractContextManager[None]] = DEVICE.using
    ) -> Made:
        """Do work in the one thread whose passes replay CUDA graphs: onnxruntime keeps them by thread."""
        return self._thread.submit(self._in_block, work, block).result()

    def _in_block(self, work: Callable[[], Made], block: Callable[[], AbstractContextManager[None]]) -> Made:
        """Do work. After an error the stream is empty: what comes next may write the pages of a pass that failed."""
        with block():
            try:
                return work()
            except BaseException:
                with suppress(DeviceError):
                    self.stream.wait()
                raise

    def _enqueued(self, trees: Sequence[PagedInput]) -> BoundPass:
        """Enqueue a pass: as a CUDA graph if its bucket was captured, else by its own shape."""
        shape = PassShape.of(trees)
        made = self._graphs.get(shape.bucket or shape) or self._pass(shape)
        made.run(trees)
        return made

    def _capture(self, shape: PassShape) -> None:
        made = self._buffers(shape, graph=len(self._graphs) + 1)
        made.launch()
        self.stream.wait()
        self._graphs[shape] = made

    def _buffers(self, shape: PassShape, graph: int = -1) -> BoundPass:
        return BoundPass(self._session, self._pools, shape, self._scores, self._device, self.stream, graph)

    def _pass(self, shape: PassShape) -> BoundPass:
        """Return the buffers of a shape: those that are kept, or new ones."""
        found = self._bound.pop(shape, None)
        while found is None and len(self._bound) >= _KEPT_SHAPES:
            self._bound.popitem(last=False)
        self._bound[shape] = found or self._buffers(shape)
        return self._bound[shape]


def _stream(path: Path, provider: Provider) -> DeviceStream:
    check_provider(path, provider)
    try:
        return device_stream(provider)
    except DeviceError as error:
        raise BundleError(f"{path}: provider {provider}: it is installed but cannot be used: {error}") from error


ModelDecoder: TypeAlias = Decoder | DeviceDecoder
"""A loaded model: its host's graph, or its device's."""
