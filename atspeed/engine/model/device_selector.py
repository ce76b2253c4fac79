"""Selection of the best children on a device: one copy in, one copy back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.errors import DeviceError, NoNumbersError
from atspeed.engine.model.decoder import RuntimeOptions, open_session
from atspeed.engine.model.device_pools import allocate
from atspeed.engine.model.device_selection import LEAST_TEMPERATURE, DeviceSelection, RowSelection, Selected
from atspeed.engine.model.device_stream import DeviceStream
from atspeed.engine.model.onnx_bytes import ELEMENT_TYPES
from atspeed.engine.model.selection_graph import selection_graph
from atspeed.engine.model.staged_inputs import Axes, StagedInputs, offsets_of, views
from atspeed.engine.search.scoring import Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, Trie

# Steps of the sizes of a selection, so that few bindings serve all of them. Chosen, not measured.
_LIMIT_STEP, _EXCEPTION_STEP = 8, 64
_KEPT_SHAPES = 64


@dataclass(frozen=True)
class _Shape:
    """The sizes of a selection, padding included.

    Attributes:
        rows: rows of scores.
        limit: children of a row.
        exceptions: places that prunings name.
        noise: rows and width of the noise.
    """

    rows: int
    limit: int
    exceptions: int
    noise: tuple[int, int]

    @property
    def input_axes(self) -> Axes:
        """Return the inputs that change with every pass."""
        return {
            "node": ("int32", (self.rows,)),
            "live_by_default": ("bool", (self.rows,)),
            "exceptions": ("int64", (self.exceptions,)),
            "exceptions_live": ("bool", (self.exceptions,)),
            "inverse_temperature": ("float32", (self.rows,)),
            "noise": ("float32", self.noise),
        }

    @property
    def output_axes(self) -> Axes:
        """Return the outputs."""
        best = (self.rows, self.limit)
        row = ("float32", (self.rows,))
        return {"child": ("int32", best), "logp": ("float32", best), "log_mass": row, "faults": row}


class DeviceSelector:
    """Selects the children of one catalogue on a device. For one thread at a time: the one that makes passes.

    The catalogue's arrays are brought to the device by the first selection.

    Args:
        trie: the catalogue's trie.
        rule: the scoring rule.
        code_tokens: the token id of each code column, int64 [C].
        options: the options of onnxruntime; scores are on their provider's device.
        stream: the order of that device's work.
    """

    def __init__(
        self, trie: Trie, rule: ScoringRule, code_tokens: Int64, options: RuntimeOptions, stream: DeviceStream
    ) -> None:
        self._selection = DeviceSelection(trie, rule, code_tokens)
        self._rule = rule
        self._options = options
        self._stream = stream
        self._bound: dict[_Shape, _BoundSelection] = {}

    def can_select(self, rows: Sequence[RowSelection]) -> bool:
        """Return whether float32 is wide enough for what is asked."""
        perturbations = [part.selection.perturbation for part in rows if part.selection.perturbation]
        return all(one.temperature >= LEAST_TEMPERATURE for one in perturbations)

    def select(self, scores: ort.OrtValue, rows: Sequence[RowSelection]) -> list[Evaluation | NoNumbersError]:
        """Return the evaluation of each tree, or the error of one whose scores are no numbers. Raises DeviceError.

        Args:
            scores: on the device, float32 [R, C]; the rows of the trees one after the other, then padding.
            rows: the evaluated nodes of each tree, and what is asked of them.
        """
        inputs = self._selection.inputs(rows)
        width, limit, noise = self._selection.width, int(inputs["limit"][0]), inputs["noise"].shape
        count = scores.shape()[0]
        shape = _Shape(
            count,
            min(width, _up(limit, _LIMIT_STEP)),
            _up(len(inputs["exceptions"]), _EXCEPTION_STEP),
            noise if noise == (1, 1) else (count, width),
        )
        try:
            found = self._pass(shape).run(scores, inputs, padding=width - 1)
        except DeviceError:
            raise
        except Exception as error:  # onnxruntime raises a dozen unrelated types here
            raise DeviceError(f"a selection of {shape} failed on the device: {error}") from error
        made = sum(len(part.nodes) for part in rows)
        return self._selection.evaluations(rows, Selected(**{name: array[:made] for name, array in found.items()}))

    @cached_property
    def _session(self) -> ort.InferenceSession:
        files = ModelFiles(Path("selection.onnx"), selection_graph(self._rule), {})
        return open_session(files, self._options, self._stream.provider_options)

    @cached_property
    def _catalogue(self) -> dict[str, ort.OrtValue]:
        device = self._options.provider
        arrays = self._selection.catalogue.items()
        return {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in arrays}

    def _pass(self, shape: _Shape) -> _BoundSelection:
        """Return the buffers of a shape: those that are kept, else new ones in place of the oldest."""
        if shape not in self._bound:
            while len(self._bound) >= _KEPT_SHAPES:
                self._bound.pop(next(iter(self._bound)))
            self._bound[shape] = _BoundSelection(
                self._session, self._catalogue, shape, self._options.provider, self._stream
            )
        return self._bound[shape]


class _BoundSelection:
    """Buffers of selections of one shape."""

    def __init__(
        self,
        session: ort.InferenceSession,
        catalogue: dict[str, ort.OrtValue],
        shape: _Shape,
        device: str,
        stream: DeviceStream,
    ) -> None:
        self._session, self._stream = session, stream
        self._shape = shape
        self._binding = session.io_binding()
        self._options = stream.run_options()
        self._staged = StagedInputs(self._binding, shape.input_axes, device, stream)
        for name, value in catalogue.items():
            self._binding.bind_ortvalue_input(name, value)
        self._limit = np.array([shape.limit])  # TopK reads it on the host
        self._binding.bind_cpu_input("limit", self._limit)
        offsets, size = offsets_of(shape.output_axes)
        self._outputs = allocate((size,), "uint8", device)
        self._found = stream.buffer(size)
        for name, (dtype, axes) in shape.output_axes.items():
            address = self._outputs.data_ptr() + offsets[name]
            self._binding.bind_output(name, device, 0, ELEMENT_TYPES[dtype], axes, address)

    def run(
        self, scores: ort.OrtValue, inputs: dict[str, npt.NDArray[Any]], *, padding: int
    ) -> dict[str, npt.NDArray[Any]]:
        """Select behind the pass, and wait; return the outputs of all rows. padding: a place that holds no child."""
        arrays = self._staged.arrays
        rest: dict[str, Any] = {"node": ROOT, "live_by_default": True, "exceptions": padding, "exceptions_live": False}
        for name, array in arrays.items():
            values = inputs[name]
            array[: len(values)] = values
            array[len(values) :] = rest.get(name, 0)
        self._binding.bind_ortvalue_input("scores", scores)
        self._staged.copy()
        self._session.run_with_iobinding(self._binding, self._options)
        self._stream.to_host(self._outputs, self._found)
        self._stream.wait()
        return views(self._found.copy(), self._shape.output_axes)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
