"""Building blocks of an ONNX graph, and the file of weights that graphs share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from atspeed.engine.model.decoder import TensorSpec
from atspeed.engine.model.graph_form import ORDERED

DATA_FILE = "model.onnx.data"

_OPSET = 23  # the first opset with Attention, RotaryEmbedding and RMSNormalization
_IR_VERSION = 11  # the IR version that onnx released together with opset 23
PAGE = 4096  # tensors start on pages: onnxruntime maps the file where it cannot take a tensor from memory


class WeightFile:
    """A file of weights beside a graph. A second graph of the same model takes them from the same places.

    Args:
        file: the open file.
        name: its name in the graphs.
    """

    def __init__(self, file: BinaryIO, name: str = DATA_FILE) -> None:
        self._file = file
        self._name = name
        self._count = 0
        self._kept: dict[Hashable, TensorProto] = {}

    def add(self, tensor: Tensor) -> TensorProto:
        """Append a weight in its own dtype."""
        tensor = tensor.detach().cpu().contiguous()
        self._file.write(bytes(-self._file.tell() % PAGE))
        offset, length = self._file.tell(), tensor.numel() * tensor.element_size()
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16
        return self._proto(onnx_type(tensor.dtype), tensor.shape, offset, length)

    def keep(self, key: Hashable, tensor: Callable[[], Tensor]) -> TensorProto:
        """Append a weight the first time that its key is asked for."""
        if key not in self._kept:
            self._kept[key] = self.add(tensor())
        return self._kept[key]

    def rows(self, weight: TensorProto, first: int, end: int) -> TensorProto:
        """Return the rows first .. end - 1 of a kept weight, as a weight of its own at the same place."""
        place = {entry.key: entry.value for entry in weight.external_data}
        row = int(place["length"]) // weight.dims[0]
        dims = [end - first, *weight.dims[1:]]
        return self._proto(weight.data_type, dims, int(place["offset"]) + first * row, (end - first) * row)

    def _proto(self, data_type: int, dims: Sequence[int], offset: int, length: int) -> TensorProto:
        proto = TensorProto(name=f"weight_{self._count}", dims=dims, data_type=data_type)
        self._count += 1
        proto.data_location = TensorProto.EXTERNAL
        for key, value in {"location": self._name, "offset": offset, "length": length}.items():
            proto.external_data.add(key=key, value=str(value))
        return proto


class GraphBuilder:
    """Collects nodes and initializers: small integers in the graph itself, weights in the weight file."""

    def __init__(self, weights: WeightFile) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._weights = weights
        self._names: set[str] = set()

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output, called `name` or numbered. Returns the output's name."""
        output = name or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))
        return output

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """Split the last axis into parts of these sizes."""
        if len(sizes) == 1:
            return [value]
        name = f"Split_{len(self.nodes)}"
        parts = [f"{name}_{part}" for part in range(len(sizes))]
        self.nodes.append(helper.make_node("Split", [value, self.integers(*sizes)], parts, name=name, axis=-1))
        return parts

    def integers(self, *values: int) -> str:
        """Add an int64 vector."""
        return self.constant(np.asarray(values, dtype=np.int64))

    def floats(self, *values: float) -> str:
        """Add a float32 vector."""
        return self.constant(np.asarray(values, dtype=np.float32))

    def constant(self, values: np.ndarray[Any, Any]) -> str:
        """Add a small array to the graph itself."""
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(values, name))
        return name

    def tensor(self, tensor: Tensor) -> str:
        """Add a weight in its own dtype."""
        return self._initializer(self._weights.add(tensor))

    def kept(self, key: Hashable, tensor: Callable[[], Tensor]) -> str:
        """Add a weight that is written once for all graphs of the weight file."""
        return self._initializer(self._weights.keep(key, tensor))

    def kept_rows(self, key: Hashable, tensor: Callable[[], Tensor], first: int, end: int) -> str:
        """Add the rows first .. end - 1 of such a weight."""
        return self._initializer(self._weights.rows(self._weights.keep(key, tensor), first, end))

    def _initializer(self, proto: TensorProto) -> str:
        if proto.name not in self._names:
            self._names.add(proto.name)
            self.initializers.append(proto)
        return proto.name

    def finished(
        self, name: str, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec], *, ordered: bool = False
    ) -> onnx.ModelProto:
        """Return the graph as a model with these inputs and outputs. ordered: whether its sums have one order."""
        fed, fetched = ([_value_info(*one) for one in specs.items()] for specs in (inputs, outputs))
        graph = helper.make_graph(self.nodes, name, fed, fetched, self.initializers)
        domains = sorted({"", *(node.domain for node in self.nodes)})
        opsets = [helper.make_opsetid(domain, 1 if domain else _OPSET) for domain in domains]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="atspeed-serving")
        if ordered:
            helper.set_model_props(model, {ORDERED: "true"})
        return model


def onnx_type(dtype: torch.dtype | str) -> int:
    """Return onnx's number of an element type, such as torch.bfloat16 or "bfloat16"."""
    name = str(dtype).removeprefix("torch.")
    if name == "bfloat16":  # numpy has none
        return int(TensorProto.BFLOAT16)
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(name)))


def _value_info(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx_type(spec.dtype), list(spec.axes))
