"""Passes of one shape on a device, with inputs and scores at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from atspeed.engine.arrays import Int64
from atspeed.engine.errors import DeviceError
from atspeed.engine.model.device_graph import CAPACITY_STEP, SCRATCH_SLOT, ZERO_SLOT
from atspeed.engine.model.device_pools import DevicePools, allocate
from atspeed.engine.model.staged_inputs import Axes, StagedInputs
from atspeed.engine.model.token_tree import PathPass

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
    def input_axes(self) -> Axes:
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

    Attributes:
        shape: the sizes.
        scores: the scores of a pass, on the device, float32 [rows, columns].
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
        self._binding = session.io_binding()
        self._inputs = StagedInputs(self._binding, shape.input_axes, device)
        self.scores = allocate((shape.rows, scores[1]), "float32", device)
        self._binding.bind_ortvalue_output(scores[0], self.scores)
        pools.bind(self._binding)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph))
        self._fill_with_padding()

    def run(self, trees: Sequence[PagedInput]) -> None:
        """Make a pass: the first rows of `scores` are those of the trees, one after the other. Raises DeviceError."""
        self._fill(trees)
        self.launch()

    def launch(self) -> None:
        """Copy the inputs and run. Before any `run` it is a pass over padding alone. Raises DeviceError."""
        try:
            self._inputs.copy()
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime raises a dozen unrelated types here
            raise DeviceError(f"a pass of {self.shape} failed on the device: {error}") from error

    def _fill_with_padding(self) -> None:
        """Let every token be one that sees the zero slot alone and is written to the scratch slot."""
        self._inputs.arrays["write_slots"][:] = SCRATCH_SLOT
        self._inputs.arrays["prefix_lengths"][:] = 1

    def _fill(self, trees: Sequence[PagedInput]) -> None:
        """Write the inputs. A padding token repeats its row's first token, and is written to the scratch slot."""
        arrays = self._inputs.arrays
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
