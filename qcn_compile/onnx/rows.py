"""Rows of the op table that are one standard ONNX op, or two: written in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qcn_compile.errors import LoweringError
from qcn_compile.ir.batch import TORCH
from qcn_compile.ir.graph import Op
from qcn_compile.ir.types import DType
from qcn_compile.onnx.builder import KINDS, Nodes

Emit = Callable[[Nodes, Op, list[str], list[str]], None]
SIMPLE = {"add": "Add", "mul": "Mul", "sub": "Sub", "div": "Div", "neg": "Neg", "exp": "Exp", "sigmoid": "Sigmoid",
          "softplus": "Softplus", "cos": "Cos", "sin": "Sin"}


def simple(kind: str) -> Emit:
    """One node of that kind."""
    return lambda b, op, ins, outs: _done(b.node(kind, *ins, outputs=outs))


def _done(name: str) -> None:
    del name


def _attr(op: Op, key: str) -> Any:
    return op.attrs[key]


def constant(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    array = np.array(op.attrs["values"], str(TORCH[op.result.tensor.dtype.value]).removeprefix("torch."))
    b.node("Identity", b.constant(array.reshape(_attr(op, "shape"))), outputs=outs)


def reshape(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.reshape(ins[0], *(d if isinstance(d, int) else -1 for d in op.result.tensor.shape), outputs=outs)


def transpose(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    order = list(range(op.result.tensor.rank))
    first, second = _attr(op, "a"), _attr(op, "b")
    order[first], order[second] = order[second], order[first]
    b.node("Transpose", ins[0], perm=order, outputs=outs)


def slice_(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.slice(ins[0], _attr(op, "axis"), _attr(op, "start"), _attr(op, "stop"), outputs=outs)


def concat(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Concat", *ins, axis=_attr(op, "axis"), outputs=outs)


def expand(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Expand", ins[0], b.ints(*_attr(op, "shape")), outputs=outs)


def embedding(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    if _attr(op, "first") if "first" in op.attrs else 0:
        raise LoweringError(f"embedding at {op.loc} holds a part of the table: ONNX is for one rank")
    b.node("Gather", ins[1], ins[0], axis=0, outputs=outs)


def linear(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    if op.inputs[0].tensor.rank == 2:
        b.node("Gemm", *ins, transB=1, outputs=outs)
        return
    product = b.node("MatMul", ins[0], b.node("Transpose", ins[1], perm=[1, 0]),
                     outputs=None if len(ins) > 2 else outs)
    if len(ins) > 2:
        b.node("Add", product, ins[2], outputs=outs)


def gather_rows(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Gather", *ins, axis=0, outputs=outs)


def silu(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Mul", ins[0], b.node("Sigmoid", ins[0]), outputs=outs)


def rsqrt(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Reciprocal", b.node("Sqrt", ins[0]), outputs=outs)


def scalar(kind: str, attr: str) -> Emit:
    """x (kind) a number among the attributes."""
    return lambda b, op, ins, outs: _done(b.node(kind, ins[0], b.scalar(_attr(op, attr)), outputs=outs))


def cast(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Cast", ins[0], to=KINDS[_attr(op, "dtype")], outputs=outs)


def mean(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("ReduceMean", ins[0], b.ints(_attr(op, "axis")), keepdims=int(_attr(op, "keepdim")), outputs=outs)


def total(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("ReduceSum", ins[0], b.ints(_attr(op, "axis")), keepdims=int(_attr(op, "keepdim")), outputs=outs)


def softmax(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Softmax", b.node("Cast", ins[0], to=KINDS[DType.f32]), axis=_attr(op, "axis"), outputs=outs)


def topk(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("TopK", ins[0], b.ints(_attr(op, "k")), axis=-1, largest=1, sorted=1, outputs=outs)


ROWS: dict[str, Emit] = {
    **{name: simple(kind) for name, kind in SIMPLE.items()},
    "constant": constant, "reshape": reshape, "transpose": transpose, "slice": slice_, "concat": concat,
    "expand": expand, "linear": linear, "embedding": embedding, "gather_rows": gather_rows, "silu": silu,
    "rsqrt": rsqrt, "add_scalar": scalar("Add", "value"), "mul_scalar": scalar("Mul", "value"),
    "pow": scalar("Pow", "exponent"), "cast": cast, "mean": mean, "sum": total, "softmax": softmax, "topk": topk,
}
