"""A decoder on a device: passes over token trees of any lengths, KV in pages."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.bundle.manifest import Head
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.errors import BundleError, DeviceError, NoNumbersError
from atspeed.engine.kv.page_pool import PagePool
from atspeed.engine.model.batch_decoder import TreeOutput
from atspeed.engine.model.decoder import Decoder, RuntimeOptions, check_contract, graph_specs, open_session
from atspeed.engine.model.device_graph import FREE_SLOTS_FROM, SCORES, device_inputs, device_outputs
from atspeed.engine.model.device_pass import CAPACITY_BUCKETS, NEW_BUCKETS, BoundPass, PagedInput, PassShape
from atspeed.engine.model.device_pools import DevicePools, host_dtype
from atspeed.engine.model.device_selection import RowSelection
from atspeed.engine.model.device_selector import DeviceSelector
from atspeed.engine.model.free_memory import default_pool_bytes
from atspeed.engine.search.scoring import Evaluation

# Shapes whose buffers are kept, besides those of CUDA graphs. Chosen, not measured.
_KEPT_SHAPES = 32


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
        self._session = open_session(files, options, cuda_graphs=True)
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
        self._lock = threading.Lock()
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
        with self._lock:
            made = self._pass(PassShape.of(trees))
            made.run(trees)
            scores = np.array(made.scores.numpy()[: sum(len(tree.step.rows) for tree in trees)])
        normalizer = np.zeros(len(scores), dtype=np.float32)  # scores are normalised, or their rule does not ask
        ends = np.cumsum([len(tree.step.rows) for tree in trees])[:-1]
        return [TreeOutput(*parts) for parts in zip(np.split(scores, ends), np.split(normalizer, ends), strict=True)]

    def run_and_select(
        self, trees: Sequence[PagedInput], selector: DeviceSelector, rows: Sequence[RowSelection]
    ) -> list[Evaluation | NoNumbersError]:
        """Make a pass and select the best children of its rows on the device; the scores stay there. Raises DeviceError."""
        with self._lock:
            made = self._pass(PassShape.of(trees))
            made.run(trees)
            return selector.select(made.scores, rows)

    def capture(self, depth: int, longest: int) -> None:
        """Capture the CUDA graphs of all buckets on a GPU; nothing on a CPU.

        Raises BundleError when a bucket does not fit the device.

        Args:
            depth: ancestors of a token.
            longest: tokens of the longest tree.
        """
        if self._device != "cuda":
            return
        top = next((size for size in CAPACITY_BUCKETS if size >= longest), CAPACITY_BUCKETS[-1])
        for capacity, new in product(CAPACITY_BUCKETS, NEW_BUCKETS):
            shape = PassShape(1, new, capacity, new, depth)
            if capacity > top or new > capacity or shape in self._graphs:
                continue
            try:
                with self._lock:
                    made = self._buffers(shape, graph=len(self._graphs) + 1)
                    made.launch()
                    self._graphs[shape] = made
            except DeviceError as error:
                raise BundleError(
                    f"{self.path}: {new} new tokens behind {capacity} places do not fit the device beside "
                    f"{self._pools.nbytes / 2**20:.0f} MiB of keys and values (kv_device_mb): {error}"
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

    def _buffers(self, shape: PassShape, graph: int = -1) -> BoundPass:
        return BoundPass(self._session, self._pools, shape, self._scores, self._device, graph)

    def _pass(self, shape: PassShape) -> BoundPass:
        """Return the buffers of a shape: a captured one, else one that is kept, else a new one."""
        if shape in self._graphs:
            return self._graphs[shape]
        found = self._bound.pop(shape, None)
        while found is None and len(self._bound) >= _KEPT_SHAPES:
            self._bound.popitem(last=False)
        self._bound[shape] = found or self._buffers(shape)
        return self._bound[shape]


ModelDecoder: TypeAlias = Decoder | DeviceDecoder
"""A loaded model: its host's graph, or its device's."""
