"""Nodes, constants and weights of the ONNX graph under construction. Weights go straight into the data file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qcn_compile.ir.types import Dim, DType, TensorType

OPSET = 18  # what the standard ops used here need; every onnxruntime since 1.14 has it
ALIGNMENT = 4096  # of weights in the data file, so that they can be mapped
KINDS = {DType.f32: TensorProto.FLOAT, DType.i64: TensorProto.INT64, DType.i32: TensorProto.INT32,
         DType.i1: TensorProto.BOOL, DType.i8: TensorProto.INT8, DType.u8: TensorProto.UINT8,
         DType.bf16: TensorProto.BFLOAT16, DType.f16: TensorProto.FLOAT16}
LAST = 2 ** 31 - 1


class Builder:
    """Collects a graph; methods that add nodes return the names of their results."""

    def __init__(self, data: BinaryIO, location: str) -> None:
        self.data, self.location = data, location
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.fresh = 0
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}

    def name(self, stem: str) -> str:
        """A name of its own for an inner value."""
        self.fresh += 1
        return f"{stem}/{self.fresh}"

    def node(self, kind: str, *inputs: str, outputs: list[str] | None = None, **attrs: Any) -> str:
        """Add a node; returns its first result."""
        names = outputs or [self.name(kind)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attrs))
        return names[0]

    def ints(self, *values: int) -> str:
        """An i64 vector constant."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """An f32 constant."""
        return self.constant(np.array(value, np.float32))

    def constant(self, array: np.ndarray) -> str:
        """A small constant, shared by all that ask for the same one."""
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = self.name("constant")
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def weight(self, name: str, tensor: Tensor) -> str:
        """A tensor in the data file, as f32."""
        array = np.ascontiguousarray(tensor.float().numpy())
        self.data.write(b"\0" * (-self.data.tell() % ALIGNMENT))
        proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape,
                            data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.location), ("offset", self.data.tell()), ("length", array.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        self.data.write(array.data)
        self.initializers.append(proto)
        return name

    def silu(self, x: str) -> str:
        """x * sigmoid(x)."""
        return self.node("Mul", x, self.node("Sigmoid", x))

    def slice(self, x: str, axis: int, start: int, stop: int = LAST, outputs: list[str] | None = None) -> str:
        """x[..., start:stop, ...] along an axis."""
        return self.node("Slice", x, self.ints(start), self.ints(stop), self.ints(axis), outputs=outputs)

    def reshape(self, x: str, *shape: int, outputs: list[str] | None = None) -> str:
        """The same elements; one size may be -1."""
        return self.node("Reshape", x, self.ints(*shape), outputs=outputs)

    def model(self, name: str) -> Any:
        """The finished model."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8,
                                 producer_name="qcn-compile")


def info(name: str, type_: TensorType, *batch: int | str) -> Any:
    """Name, type and symbolic shape of a model input or output."""
    return helper.make_tensor_value_info(name, KINDS[type_.dtype], [*batch, *map(_size, type_.shape)])


def _size(dim: Dim) -> int | str:
    return dim if isinstance(dim, int) else str(dim)


def save(model: Any, file: Path) -> None:
    """Check and write the model beside its data file."""
    file.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(file))
