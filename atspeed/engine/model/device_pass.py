"""Passes of one shape on a device: inputs and outputs at fixed addresses, one copy in and one copy out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from atspeed.engine.arrays import Float32, Int64
from atspeed.engine.errors import DeviceError
from atspeed.engine.model.device_graph import CAPACITY_STEP, SCRATCH_SLOT, ZERO_SLOT
from atspeed.engine.model.device_pools import DevicePools, allocate
from atspeed.engine.model.onnx_bytes import ELEMENT_TYPES
from atspeed.engine.model.token_tree import PathPass

# Alignment of the inputs in the copied buffer: that of CUDA's own allocations.
_ALIGNMENT = 256
# New tokens, and places, of the passes that a GPU replays as CUDA graphs. Places are multiples of CAPACITY_STEP.
NEW_BUCKETS = (8, 16, 32, 64, 128, 256, 512)
CAPACITY_BUCKETS = (128, 256, 512, 1024, 2048)
# Steps of the sizes of all other passes. Chosen, not measured: more sizes would mean less padding and more bindings.
_NEW_STEP, _CAPACITY_STEP, _ROW_STEP = 8, 8 * CAPACITY_STEP, 8


@dataclass(frozen=True)
class PagedInput:
    """One tree's part of a pass.

    Attributes:
        step: the tokens that the model reads.
        slots: the slot of each place, int64 [P + S], those of the new tokens included.
    """

    step: PathPass
    slots: Int64


@dataclass(frozen=True)
class PassShape:
    """The sizes of a pass, padding included.

    Attributes:
        batch: trees.
        new: new tokens of a tree.
        capacity: places of a tree.
        rows: rows of scores, over all trees.
        depth: ancestors of a token.
    """

    batch: int
    new: int
    capacity: int
    rows: int
    depth: int

    @classmethod
    def of(cls, trees: Sequence[PagedInput]) -> PassShape:
        """Return the shape of a pass over trees: a bucket for one tree that fits into it, else the next multiples."""
        new = max(len(tree.step.tokens) for tree in trees)
        capacity = max(len(tree.slots) for tree in trees)
        rows = sum(len(tree.step.rows) for tree in trees)
        depth = max(tree.step.ancestors.shape[1] for tree in trees)
        if len(trees) == 1 and new <= NEW_BUCKETS[-1] and capacity <= CAPACITY_BUCKETS[-1]:
            bucket = next(size for size in NEW_BUCKETS if size >= new)
            places = next(size for size in CAPACITY_BUCKETS if size >= capacity)
            return cls(1, bucket, places, bucket, depth)
        return cls(
            len(trees),
            _up(new, _NEW_STEP),
            _up(capacity, _CAPACITY_STEP),
            _up(rows, _ROW_STEP),
            depth,
        )

    @property
    def input_axes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the number format and axes of each small input."""
        tokens = (self.batch, self.new)
        return {
            "input_ids": ("int64", tokens),
            "position_ids": ("int64", tokens),
            "write_slots": ("int64", tokens),
            "slot_table": ("int32", (self.batch, self.capacity)),
            "prefix_lengths": ("int64", tokens),
            "ancestors": ("int32", (*tokens, self.depth)),
            "out_index": ("int64", (self.rows,)),
        }


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


class BoundPass:
    """A pass of one shape. Its small inputs lie side by side in one buffer, so that one copy brings all of them.

    All addresses are fixed, as a captured CUDA graph needs them. For one thread at a time. Raises DeviceError without room.

    Args:
        session: the model.
        pools: keys and values.
        shape: the sizes.
        scores: the output with the scores, and its columns.
        device: onnxruntime's name of the device.
        graph: the number of its CUDA graph, captured in its first run; -1 for none.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        pools: DevicePools,
        shape: PassShape,
        scores: tuple[str, int],
        device: str,
        graph: int = -1,
    ) -> None:
        self.shape = shape
        self._session = session
        offsets, size = {}, 0
        for name, (dtype, axes) in shape.input_axes.items():
            offsets[name] = size
            size += _up(prod(axes) * np.dtype(dtype).itemsize, _ALIGNMENT)
        self._staged = np.zeros(size, dtype=np.uint8)
        self._inputs = allocate((size,), "uint8", device)
        self._scores = allocate((shape.rows, scores[1]), "float32", device)
        self._arrays: dict[str, npt.NDArray[np.int64]] = {}
        self._binding = session.io_binding()
        for name, (dtype, axes) in shape.input_axes.items():
            part = self._staged[offsets[name] : offsets[name] + prod(axes) * np.dtype(dtype).itemsize]
            self._arrays[name] = part.view(dtype).reshape(axes)
            address = self._inputs.data_ptr() + offsets[name]
            self._binding.bind_input(name, device, 0, ELEMENT_TYPES[dtype], axes, address)
        self._binding.bind_ortvalue_output(scores[0], self._scores)
        pools.bind(self._binding)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph))
        self._fill_with_padding()

    def run(self, trees: Sequence[PagedInput]) -> Float32:
        """Make a pass; return the scores of all trees' rows, float32 [M, C]. Raises DeviceError."""
        self._fill(trees)
        self.launch()
        return np.array(self._scores.numpy()[: sum(len(tree.step.rows) for tree in trees)])

    def launch(self) -> None:
        """Copy the inputs and run. Before any `run` it is a pass over padding alone. Raises DeviceError."""
        try:
            self._inputs.update_inplace(self._staged)
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime raises a dozen unrelated types here
            raise DeviceError(f"a pass of {self.shape} failed on the device: {error}") from error

    def _fill_with_padding(self) -> None:
        """Let every token be one that sees the zero slot alone and is written to the scratch slot."""
        self._arrays["write_slots"][:] = SCRATCH_SLOT
        self._arrays["prefix_lengths"][:] = 1

    def _fill(self, trees: Sequence[PagedInput]) -> None:
        """Write the inputs. A padding token repeats its row's first token, and is written to the scratch slot."""
        arrays = self._arrays
        for row, tree in enumerate(trees):
            step, new, places = tree.step, len(tree.step.tokens), len(tree.slots)
            for name, values in (
                ("input_ids", step.tokens),
                ("position_ids", step.positions),
                ("prefix_lengths", step.prefix_lengths),
                ("ancestors", step.ancestors),
            ):
                array = arrays[name]
                array[row, :new] = values
                array[row, new:] = values[0]
            write, table = arrays["write_slots"], arrays["slot_table"]
            write[row, :new] = tree.slots[places - new :]
            write[row, new:] = SCRATCH_SLOT
            table[row, :places] = tree.slots
            table[row, places:] = ZERO_SLOT
        rows = np.concatenate([tree.step.rows + row * self.shape.new for row, tree in enumerate(trees)])
        arrays["out_index"][: len(rows)] = rows
        arrays["out_index"][len(rows) :] = 0
