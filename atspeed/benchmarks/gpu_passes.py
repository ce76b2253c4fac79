"""Times of passes at the shapes of large models, on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnxruntime
import torch

from atspeed.benchmarks.gpu_config import GpuConfig
from atspeed.benchmarks.made_models import PAGE_TOKENS, MadeModel, make_large
from atspeed.benchmarks.model_probe import bytes_per_second, bytes_read
from atspeed.benchmarks.probe_trees import HostPasses, PagedPasses, ProbeTree
from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.model.device_decoder import DeviceDecoder
from atspeed.training.inflation import SHAPES

_COPIED = 2**27  # bytes of a copy that is timed
_SECONDS = 2.0  # most time of one measurement
_EAGER = 3  # passes that are measured without CUDA graphs too
_BLOCKS = 1000 // PAGE_TOKENS  # blocks of a prompt of 1,000 tokens


def machine(config: GpuConfig) -> Iterator[dict[str, Any]]:
    """Yield the speed of copies, in GB/s. Within the device's memory only where torch sees the device."""
    host = np.zeros(_COPIED, dtype=np.uint8)
    on_device = onnxruntime.OrtValue.ortvalue_from_numpy(host, config.provider, 0)
    within = bytes_per_second(config.provider) / 1e9 if _torch_sees_it(config) else None
    yield {
        "kind": "machine",
        "host_to_device_gb_s": round(_COPIED / 1e6 / _milliseconds(lambda: on_device.update_inplace(host), 5), 2),
        "device_to_host_gb_s": round(_COPIED / 1e6 / _milliseconds(on_device.numpy, 5), 2),
        "device_gb_s": within and round(within, 1),  # bytes read and bytes written
    }


def passes(size: str, config: GpuConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of one size: the graph for devices as it is served, then parts of it, then the host's graph."""
    begun = time.perf_counter()
    shape = replace(SHAPES[size], vocab_size=SHAPES[size].vocab_size or 32_000)
    made = make_large("llama", shape, config.precision, config.seed)
    read_ms = None
    if _torch_sees_it(config):
        weights = bytes_read(shape, made.vocab_size, _BYTES[config.precision])
        read_ms = 1e3 * weights / bytes_per_second(config.provider)
    probe = _Probe(size, made, config, read_ms)
    yield probe.lasted("made", begun)
    yield from probe.on_device()
    gc.collect()  # the device's graph and its pools
    yield from probe.on_host()


_BYTES: dict[Precision, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class _Probe:
    """One size. read_ms: the time of one read of its weights."""

    size: str
    made: MadeModel
    config: GpuConfig
    read_ms: float | None
    labels: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", {"model": self.size, "precision": self.config.precision})

    def lasted(self, kind: str, begun: float, **more: str) -> dict[str, Any]:
        """Return a row with the seconds since then."""
        return {"kind": kind, **self.labels, **more, "seconds": round(time.perf_counter() - begun, 2)}

    def on_device(self) -> Iterator[dict[str, Any]]:
        """Yield passes of the graph for devices."""
        begun = time.perf_counter()
        decoder = self.made.on_device(self.config.options, self.config.pool_mb)
        yield self.lasted("loaded", begun, graph="device")
        yield from self._paged("device", decoder, self.config.passes[:_EAGER])
        if self.config.provider == "cuda":
            begun = time.perf_counter()
            longest = max(prompt + nodes for prompt, nodes in self.config.passes)
            decoder.capture(1, longest, len(self.config.shared))
            yield self.lasted("captured", begun)
            yield from self._paged("device, captured", decoder, self.config.passes)
        yield self._shared(decoder)
        yield self._blocks(decoder)

    def on_host(self) -> Iterator[dict[str, Any]]:
        """Yield passes of the host's graph, with keys and values in the host's memory."""
        begun = time.perf_counter()
        decoder = self.made.on_host(self.config.options)
        yield self.lasted("loaded", begun, graph="host")
        for prompt, nodes in self.config.passes:
            tree = HostPasses(decoder, ProbeTree.siblings(self.made.vocab_size, prompt, nodes))
            yield self._pass("host", prompt, nodes, tree)

    def _paged(
        self, graph: str, decoder: DeviceDecoder, lengths: Sequence[tuple[int, int]]
    ) -> Iterator[dict[str, Any]]:
        for prompt, nodes in lengths:
            tree = PagedPasses(decoder, ProbeTree.siblings(self.made.vocab_size, prompt, nodes))
            yield self._pass(graph, prompt, nodes, tree)

    def _pass(self, graph: str, prompt: int, nodes: int, tree: HostPasses | PagedPasses) -> dict[str, Any]:
        spent = _milliseconds(lambda: tree.run(prompt, prompt + nodes), self.config.repeats)
        return {
            "kind": "pass",
            **self.labels,
            "graph": graph,
            "prompt": prompt,
            "nodes": nodes,
            "p50_ms": round(spent, 3),
            "read_ms": self.read_ms and round(self.read_ms, 3),
            "times_read": self.read_ms and round(spent / self.read_ms, 2),
        }

    def _shared(self, decoder: DeviceDecoder) -> dict[str, Any]:
        """Return the time of one pass over many trees of different lengths."""
        inputs, page = [], 0
        for prompt, nodes in self.config.shared:
            tree = PagedPasses(decoder, ProbeTree.siblings(self.made.vocab_size, prompt, nodes), page)
            inputs.append(tree.input(prompt, prompt + nodes))
            page = tree.pages.stop
        spent = _milliseconds(lambda: decoder.run(inputs), self.config.repeats)
        nodes = sum(nodes for _, nodes in self.config.shared)
        return {"kind": "shared", **self.labels, "trees": len(inputs), "nodes": nodes, "p50_ms": round(spent, 3)}

    def _blocks(self, decoder: DeviceDecoder) -> dict[str, Any]:
        """Return the time of a prompt's blocks on their way to the host and back: of the prefix cache, beside passes."""
        pages = range(_BLOCKS)
        blocks = decoder.read_pages(pages)
        return {
            "kind": "blocks",
            **self.labels,
            "tokens": _BLOCKS * PAGE_TOKENS,
            "mb": round(sum(block.nbytes for block in blocks) / 1e6, 1),
            "to_host_ms": round(_milliseconds(lambda: decoder.read_pages(pages), 5), 2),
            "to_device_ms": round(_milliseconds(lambda: decoder.write_pages(pages, blocks), 5), 2),
        }


def _torch_sees_it(config: GpuConfig) -> bool:
    return config.provider == "cpu" or torch.cuda.is_available()


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, after two that are not counted. Ends early when it takes long."""
    for _ in range(2):
        call()
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1e3 * _SECONDS:
        begun = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(times))
