"""Appends ops to a graph: result types from the op table, readable names, and views that cancel as they are made."""

from __future__ import annotations

from torch import Tensor

from qcn_compile.errors import IRError
from qcn_compile.ir.batch import TORCH
from qcn_compile.ir.graph import Attr, Graph, Location, Op, Value
from qcn_compile.ir.types import Dim, DType, StateRef, StateType, TensorType, product_dim
from qcn_compile.ir.verify import infer

DTYPES = {torch_dtype: DType(name) for name, torch_dtype in TORCH.items()}
_NAMED_BY_MODULE = {"linear", "embedding"}


class Builder:
    """Appends to `graph`; `at` is the location that new ops get."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.at = Location()
        self._taken: dict[str, int] = {v.name: 1 for v in graph.inputs}

    def emit(self, name: str, operands: list[Value | None], **attrs: Attr) -> list[Value]:
        """Append an op; its results."""
        op = Op(name, operands, [], attrs, self.at)
        hint = self.at.module.rpartition(".")[2] if name in _NAMED_BY_MODULE else name
        for type_ in infer(name, operands, attrs):
            op.results.append(Value(self._fresh(hint or name), type_, op))
        self.graph.ops.append(op)
        return op.results

    def one(self, name: str, operands: list[Value | None], **attrs: Attr) -> Value:
        """Append an op of one result."""
        (result,) = self.emit(name, operands, **attrs)
        return result

    def _fresh(self, hint: str) -> str:
        """`hint`, led by the layer number of the current module, made unique."""
        layer = next((part for part in self.at.module.split(".") if part.isdigit()), None)
        base = hint if layer is None else f"L{layer}.{hint}"
        count = self._taken[base] = self._taken.get(base, 0) + 1
        return base if count == 1 else self._fresh(f"{hint}_{count}")

    def weight(self, name: str, value: Tensor) -> Value:
        """The op that stands for a parameter."""
        owner, _, leaf = name.rpartition(".")
        self.at = Location(owner)
        op = Op("weight", [], [], {"name": name, "dtype": DTYPES[value.dtype], "shape": tuple(value.shape)}, self.at)
        hint = f"{owner.rpartition('.')[2]}.{leaf}".lstrip(".")
        op.results.append(Value(self._fresh(hint), TensorType(DTYPES[value.dtype], tuple(value.shape)), op))
        self.graph.ops.append(op)
        return op.result

    def constant(self, name: str, value: Tensor) -> Value:
        """The op that holds the literal values of a buffer."""
        self.at = Location(name.rpartition(".")[0])
        values = tuple(value.flatten().tolist())
        return self.one("constant", [], dtype=DTYPES[value.dtype], shape=tuple(value.shape), values=values)

    def state(self, name: str, type_: StateType) -> StateRef:
        """Declare the cache of one layer."""
        self.graph.states[name] = type_
        return StateRef(name)

    def cast(self, x: Value, dtype: DType) -> Value:
        """`x` in another dtype; `x` itself when it has it."""
        return x if x.tensor.dtype is dtype else self.one("cast", [x], dtype=dtype)

    def reshape(self, x: Value, shape: tuple[Dim, ...]) -> Value:
        """`x` under another shape; a reshape of a reshape is one reshape. Raises IRError when the sizes differ."""
        if product_dim(x.tensor.shape) != product_dim(shape):
            raise IRError(f"{x.type} has another number of elements than shape {', '.join(map(str, shape))}")
        while x.tensor.shape != shape and x.op is not None and x.op.name == "reshape":
            (inner,) = x.op.inputs
            x = inner
        return x if x.tensor.shape == shape else self.one("reshape", [x], shape=shape)  # type: ignore[arg-type]

    def transpose(self, x: Value, a: int, b: int) -> Value:
        """`x` with two axes exchanged; twice the same exchange cancels."""
        low, high = sorted((a, b))
        if low == high:
            return x
        if x.op is not None and x.op.name == "transpose" and x.op.attrs == {"a": low, "b": high}:
            (inner,) = x.op.inputs
            return inner
        return self.one("transpose", [x], a=low, b=high)

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        """`x[start:stop]` along an axis; `x` itself when that is all of it."""
        if (start, stop) == (0, x.tensor.shape[axis]):
            return x
        return self.one("slice", [x], axis=axis, start=start, stop=stop)


def drop_unused(graph: Graph) -> None:
    """Remove ops whose results nothing reads and that touch no state."""
    wanted = set(graph.outputs)
    kept: list[Op] = []
    for op in reversed(graph.ops):
        stateful = any(isinstance(a, StateRef) for a in op.attrs.values())
        if stateful or any(v in wanted for v in op.results):
            kept.append(op)
            wanted.update(op.inputs)
    graph.ops = kept[::-1]
