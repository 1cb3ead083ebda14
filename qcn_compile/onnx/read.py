"""ONNX in: a small graph of standard ops becomes Graph IR, its tensors a weight source."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from qcn_compile.errors import IRError, ModelError, QcnError
from qcn_compile.frontend.builder import Builder, drop_unused
from qcn_compile.ir.graph import Graph, Location, Value
from qcn_compile.ir.types import Dim, Sym, TensorType
from qcn_compile.ir.verify import verify
from qcn_compile.onnx.builder import KINDS
from qcn_compile.onnx.node_rules import RULES

DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
SMALL = 64  # elements of a tensor that is written into the graph as a constant


@dataclass(frozen=True)
class Imported:
    """A graph, and its tensors by the `name` attribute of its weight ops."""

    graph: Graph
    weights: dict[str, Tensor]


def read(file: Path) -> Imported:
    """Import an ONNX file. Inputs keep their names; symbolic sizes become symbols (`T` stays T, `seq_len` is SeqLen).

    Raises ModelError for a file that is no ONNX model, IRError naming the node that has no row in the op table.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such file; give the path of an ONNX model")
    try:
        model = onnx.load(str(file))
    except Exception as error:  # protobuf's own errors, and a missing data file
        raise ModelError(f"{file} cannot be read as ONNX: {error}; export it again") from None
    reader = Reader(file, re.sub(r"[^\w.-]", "_", model.graph.name) or "main")
    for tensor in model.graph.initializer:
        reader.arrays[tensor.name] = numpy_helper.to_array(tensor)
    for info in model.graph.input:
        if info.name not in reader.arrays:
            reader.input(info)
    for node in model.graph.node:
        reader.node(node)
    reader.graph.outputs = [reader.value(info.name) for info in model.graph.output]
    drop_unused(reader.graph)
    verify(reader.graph)
    used = {str(op.attrs["name"]) for op in reader.graph.ops if op.name == "weight"}
    return Imported(reader.graph, {name: tensor for name, tensor in reader.weights.items() if name in used})


@dataclass
class Node:
    """One ONNX node with the reader it is in: what a rule sees."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any]
    reader: Reader
    build: Builder = field(init=False)

    def __post_init__(self) -> None:
        self.build = self.reader.build

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.inputs) and self.inputs[index] != ""

    def value(self, index: int) -> Value:
        """An input as a value of the graph."""
        return self.reader.value(self.inputs[index])

    def array(self, index: int) -> np.ndarray | None:
        """An input whose numbers are known now; None when they are not."""
        return self.reader.arrays.get(self.inputs[index])

    def ints(self, index: int, attr: str = "") -> list[int] | None:
        """Whole numbers given as an input or, in older opsets, as an attribute; None when they are left out."""
        if attr and attr in self.attrs:
            return [int(v) for v in np.atleast_1d(self.attrs[attr])]
        if not self.has(index):
            return None
        found = self.array(index)
        if found is None:
            raise self.fail(f"input {index} ({self.inputs[index]}) is computed", "export it with constant sizes")
        return [int(v) for v in np.atleast_1d(found)]

    def fail(self, problem: str, cure: str) -> IRError:
        """The error to raise: file, node, problem, cure."""
        return IRError(f"{self.reader.file}: node {self.name!r} ({self.kind}): {problem}; {cure}")


class Reader:
    """Collects the graph; `values` and `arrays` by ONNX name."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.graph = file, Graph(name)
        self.build = Builder(self.graph)
        self.values: dict[str, Value] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.weights: dict[str, Tensor] = {}

    def input(self, info: Any) -> None:
        """Declare an input of the graph."""
        kind = info.type.tensor_type
        if kind.elem_type not in DTYPES:
            found, known = onnx.TensorProto.DataType.Name(kind.elem_type), ", ".join(d.value for d in KINDS)
            raise IRError(f"{self.file}: input {info.name!r} has element type {found}; the IR has {known}")
        shape = tuple(_dim(d, f"{info.name}{i}") for i, d in enumerate(kind.shape.dim))
        value = Value(plain(info.name), TensorType(DTYPES[kind.elem_type], shape))
        self.graph.inputs.append(value)
        self.values[info.name] = value

    def node(self, node: Any) -> None:
        """Import one node by its rule."""
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        name = node.name or next(iter(node.output), "")
        one = Node(node.op_type, name, list(node.input), list(node.output), attrs, self)
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            kind = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
            raise IRError(f"{self.file}: node {name!r} ({kind}) has no row in the op table; rewrite it with "
                          f"{', '.join(sorted(RULES))}, or add a rule to qcn_compile/onnx/node_rules.py")
        self.build.at = Location(plain(name), f"{self.file.name}:{node.op_type}")
        try:
            made = rule(one)
        except QcnError as error:
            raise error if one.name in str(error) else one.fail(str(error), "see docs/onnx.md") from None
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise one.fail(f"{type(error).__name__}: {error}", "check the model with onnx.checker") from error
        for output, value in zip(node.output, made, strict=False):
            if isinstance(value, np.ndarray):
                self.arrays[output] = value
            else:
                self.values[output] = value

    def value(self, name: str) -> Value:
        """The value of that name; a tensor of the file becomes a weight, or a constant when it is small."""
        if name not in self.values:
            if name not in self.arrays:
                raise IRError(f"{self.file}: nothing defines {name!r}; check the model with onnx.checker")
            self.values[name] = self._tensor(name, to_torch(self.arrays[name]))
        return self.values[name]

    def _tensor(self, name: str, tensor: Tensor) -> Value:
        at = self.build.at
        if tensor.numel() <= SMALL and tensor.dtype is not torch.bfloat16:
            made = self.build.constant(plain(name), tensor)
        else:
            self.weights[plain(name)] = tensor
            made = self.build.weight(plain(name), tensor)
        self.build.at = at
        return made


def to_torch(array: np.ndarray) -> Tensor:
    """The same numbers as a tensor of its own; bf16 and fp8 come from onnx as ml_dtypes arrays."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def plain(name: str) -> str:
    """A name as the text form of the IR takes it."""
    return re.sub(r"[^\w.]+", "_", name).strip("._") or "v"


def _dim(dim: Any, fallback: str) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    words = re.findall(r"[A-Za-z0-9]+", dim.dim_param or f"D{fallback}")
    return Sym("".join(word[:1].upper() + word[1:] for word in words))
