"""Passes of one shape on a device, with inputs and scores at fixed addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnxruntime as ort

from atspeed.engine.arrays import Float32, Int64
from atspeed.engine.errors import DeviceError
from atspeed.engine.model.device_graph import CAPACITY_STEP, SCRATCH_SLOT, ZERO_SLOT
from atspeed.engine.model.device_pools import DevicePools, allocate
from atspeed.engine.model.device_stream import DeviceStream
from atspeed.engine.model.staged_inputs import Axes, StagedInputs
from atspeed.engine.model.token_tree import PathPass

# Trees, new tokens of a tree, and its places, of the passes that a GPU replays as CUDA graphs. Places are multiples of
# CAPACITY_STEP.
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
NEW_BUCKETS = (8, 16, 32, 64, 128, 256, 384, 512)
CAPACITY_BUCKETS = (128, 256, 512, 1024, 2048)
# Bounds of a bucket's tokens and places, over all trees: beyond them launches are a small part of a pass.
_MOST_TOKENS, _MOST_PLACES = 512, 16384
# Padding that a graph is worth. By docs/roofline.py a graph saves 1.8 ms at 7B, as much as 100 tokens or 5,000 places cost;
# up to about 250 tokens a pass waits for its weights, so that padding is free. Arithmetic, not measured.
_FREE_TOKENS, _SPARE_TOKENS, _SPARE_PLACES = 256, 128, 4096
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
        """Return the shape of a pass over trees: the next multiples of their sizes."""
        return cls(
            len(trees),
            _up(max(len(tree.step.tokens) for tree in trees), _NEW_STEP),
            _up(max(len(tree.slots) for tree in trees), _CAPACITY_STEP),
            _up(sum(len(tree.step.rows) for tree in trees), _ROW_STEP),
            max(tree.step.ancestors.shape[1] for tree in trees),
        )

    @property
    def tokens(self) -> int:
        """Return the new tokens of all trees."""
        return self.batch * self.new

    @property
    def places(self) -> int:
        """Return the places of all trees."""
        return self.batch * self.capacity

    @property
    def bucket(self) -> PassShape | None:
        """Return the smallest bucket that holds this shape; None if there is none, or none that is worth its padding."""
        sizes = ((BATCH_BUCKETS, self.batch), (NEW_BUCKETS, self.new), (CAPACITY_BUCKETS, self.capacity))
        batch, new, capacity = (next((size for size in steps if size >= least), 0) for steps, least in sizes)
        found = PassShape(batch, new, capacity, batch * new, self.depth)
        worth = found.tokens <= max(_FREE_TOKENS, self.tokens + _SPARE_TOKENS)
        worth &= found.places <= self.places + _SPARE_PLACES
        return found if worth and found.is_bucket else None

    @property
    def is_bucket(self) -> bool:
        """Return whether the shape is one of the buckets."""
        within = 0 < self.tokens <= _MOST_TOKENS and self.new <= self.capacity and 0 < self.places <= _MOST_PLACES
        return within and self.rows == self.tokens

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


def buckets(depth: int, longest: int, trees: int) -> Iterator[PassShape]:
    """Yield the buckets of passes over up to so many trees of up to `longest` tokens, the smallest first."""
    highest = next((size for size in CAPACITY_BUCKETS if size >= longest), CAPACITY_BUCKETS[-1])
    most = next((size for size in BATCH_BUCKETS if size >= trees), BATCH_BUCKETS[-1])
    for batch, capacity, new in product(BATCH_BUCKETS, CAPACITY_BUCKETS, NEW_BUCKETS):
        shape = PassShape(batch, new, capacity, batch * new, depth)
        if shape.is_bucket and capacity <= highest and batch <= most:
            yield shape


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
        stream: the order of the device's work.
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
        stream: DeviceStream,
        graph: int = -1,
    ) -> None:
        self.shape = shape
        self._session, self._stream = session, stream
        self._binding = session.io_binding()
        self._inputs = StagedInputs(self._binding, shape.input_axes, device, stream)
        self.scores = allocate((shape.rows, scores[1]), "float32", device)
        self._found = stream.buffer(4 * shape.rows * scores[1]).view(np.float32).reshape(shape.rows, scores[1])
        self._binding.bind_ortvalue_output(scores[0], self.scores)
        pools.bind(self._binding)
        self._options = stream.run_options(graph)
        self._fill_with_padding()

    def run(self, trees: Sequence[PagedInput]) -> None:
        """Enqueue a pass: the first rows of `scores` are those of the trees, one after the other. Raises DeviceError."""
        self._fill(trees)
        self.launch()

    def read(self, rows: int) -> Float32:
        """Wait for the pass, and return the first rows of its scores, float32 [rows, columns]. Raises DeviceError."""
        found = self._found[:rows]
        self._stream.to_host(self.scores, found.reshape(-1).view(np.uint8))
        self._stream.wait()
        return found.copy()

    def launch(self) -> None:
        """Enqueue the copy of the inputs and the run. Before any `run` it is a pass over padding. Raises DeviceError."""
        try:
            self._inputs.copy()
            self._session.run_with_iobinding(self._binding, self._options)
        except DeviceError:
            raise
        except Exception as error:  # onnxruntime raises a dozen unrelated types here
            raise DeviceError(f"a pass of {self.shape} failed on the device: {error}") from error

    def _fill_with_padding(self, first: int = 0) -> None:
        """Let the tokens of a row and of all that follow see the zero slot alone, and be written to the scratch slot."""
        padding = {"write_slots": SCRATCH_SLOT, "slot_table": ZERO_SLOT, "prefix_lengths": 1, "ancestors": 0}
        for name, value in padding.items():
            self._inputs.arrays[name][first:] = value

    def _fill(self, trees: Sequence[PagedInput]) -> None:
        """Write the inputs. A padding token repeats its row's first token, and is written to the scratch slot."""
        arrays = self._inputs.arrays
        self._fill_with_padding(len(trees))
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
