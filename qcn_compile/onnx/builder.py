"""Nodes, constants, functions and weights of the ONNX model under construction."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qcn_compile.ir.types import Dim, DType, TensorType

OPSET = 18  # what the standard ops used here need; every onnxruntime since 1.14 has it
DOMAIN = "qcn"  # of the functions: rows of the op table that no single standard op computes
ALIGNMENT = 4096  # of weights in the data file, so that they can be mapped
KINDS = {DType.f32: TensorProto.FLOAT, DType.i64: TensorProto.INT64, DType.i32: TensorProto.INT32,
         DType.i1: TensorProto.BOOL, DType.i8: TensorProto.INT8, DType.u8: TensorProto.UINT8,
         DType.bf16: TensorProto.BFLOAT16, DType.f16: TensorProto.FLOAT16}
LAST = 2 ** 31 - 1


class Nodes:
    """Collects nodes; methods that add one return the name of its result. `constant` says where constants live."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
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
            self.define(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def define(self, tensor: Any) -> None:
        """A node that makes a constant: functions have no initializers."""
        self.nodes.append(helper.make_node("Constant", [], [tensor.name], value=tensor))

    def silu(self, x: str) -> str:
        """x * sigmoid(x)."""
        return self.node("Mul", x, self.node("Sigmoid", x))

    def slice(self, x: str, axis: int, start: int, stop: int = LAST, outputs: list[str] | None = None) -> str:
        """x[..., start:stop, ...] along an axis."""
        return self.node("Slice", x, self.ints(start), self.ints(stop), self.ints(axis), outputs=outputs)

    def reshape(self, x: str, *shape: int, outputs: list[str] | None = None) -> str:
        """The same elements; one size may be -1."""
        return self.node("Reshape", x, self.ints(*shape), outputs=outputs)


class Builder(Nodes):
    """The model's own graph, and the functions it calls. Weights go straight into the data file."""

    def __init__(self, data: BinaryIO, location: str) -> None:
        super().__init__()
        self.data, self.location = data, location
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.functions: dict[Hashable, Any] = {}

    def define(self, tensor: Any) -> None:
        """An initializer."""
        self.initializers.append(tensor)

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

    def function(self, key: Hashable, name: str, doc: str, arity: tuple[int, int],
                 body: Callable[[Nodes, list[str], list[str]], None]) -> str:
        """Name of the function of that key, written on first use: `body` gets its inputs and outputs."""
        if key not in self.functions:
            count = sum(f.name.partition(".")[0] == name for f in self.functions.values())
            inside, (inputs, outputs) = Nodes(), arity
            ins, outs = [f"in{i}" for i in range(inputs)], [f"out{i}" for i in range(outputs)]
            body(inside, ins, outs)
            self.functions[key] = helper.make_function(
                DOMAIN, f"{name}.{count + 1}" if count else name, ins, outs, inside.nodes,
                [helper.make_opsetid("", OPSET)])
            self.functions[key].doc_string = doc
        return str(self.functions[key].name)

    def model(self, name: str) -> Any:
        """The finished model."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)
        domains = ["", DOMAIN] if self.functions else [""]
        versions = [helper.make_opsetid(d, OPSET if d == "" else 1) for d in domains]
        return helper.make_model(graph, opset_imports=versions, functions=list(self.functions.values()), ir_version=8,
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
