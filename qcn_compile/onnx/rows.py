"""Rows of the op table in standard ONNX ops: what is pointwise, moves data or multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qcn_compile.ir.batch import TORCH
from qcn_compile.ir.graph import Op
from qcn_compile.ir.types import DType
from qcn_compile.onnx.builder import KINDS, Builder

Emit = Callable[[Builder, Op, list[str], list[str]], None]
SIMPLE = {"add": "Add", "mul": "Mul", "sub": "Sub", "div": "Div", "neg": "Neg", "exp": "Exp", "sigmoid": "Sigmoid",
          "softplus": "Softplus", "cos": "Cos", "sin": "Sin"}


def simple(kind: str) -> Emit:
    """One node of that kind."""
    return lambda b, op, ins, outs: _done(b.node(kind, *ins, outputs=outs))


def _done(name: str) -> None:
    del name


def _attr(op: Op, key: str) -> Any:
    return op.attrs[key]


def constant(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    array = np.array(op.attrs["values"], str(TORCH[op.result.tensor.dtype.value]).removeprefix("torch."))
    b.node("Identity", b.constant(array.reshape(_attr(op, "shape"))), outputs=outs)


def reshape(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.reshape(ins[0], *(d if isinstance(d, int) else -1 for d in op.result.tensor.shape), outputs=outs)


def transpose(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    order = list(range(op.result.tensor.rank))
    first, second = _attr(op, "a"), _attr(op, "b")
    order[first], order[second] = order[second], order[first]
    b.node("Transpose", ins[0], perm=order, outputs=outs)


def slice_(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.slice(ins[0], _attr(op, "axis"), _attr(op, "start"), _attr(op, "stop"), outputs=outs)


def concat(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Concat", *ins, axis=_attr(op, "axis"), outputs=outs)


def expand(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Expand", ins[0], b.ints(*_attr(op, "shape")), outputs=outs)


def linear(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    if op.inputs[0].tensor.rank == 2:
        b.node("Gemm", *ins, transB=1, outputs=outs)
        return
    product = b.node("MatMul", ins[0], b.node("Transpose", ins[1], perm=[1, 0]),
                     outputs=None if len(ins) > 2 else outs)
    if len(ins) > 2:
        b.node("Add", product, ins[2], outputs=outs)


def gather(table: int, rows: int) -> Emit:
    """Rows of operand `table` at the indices of operand `rows`."""
    return lambda b, op, ins, outs: _done(b.node("Gather", ins[table], ins[rows], axis=0, outputs=outs))


def silu(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Mul", ins[0], b.node("Sigmoid", ins[0]), outputs=outs)


def rsqrt(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Reciprocal", b.node("Sqrt", ins[0]), outputs=outs)


def scalar(kind: str, attr: str) -> Emit:
    """x (kind) a number among the attributes."""
    return lambda b, op, ins, outs: _done(b.node(kind, ins[0], b.scalar(_attr(op, attr)), outputs=outs))


def cast(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Cast", ins[0], to=KINDS[_attr(op, "dtype")], outputs=outs)


def mean(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("ReduceMean", ins[0], b.ints(_attr(op, "axis")), keepdims=int(_attr(op, "keepdim")), outputs=outs)


def total(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("ReduceSum", ins[0], b.ints(_attr(op, "axis")), keepdims=int(_attr(op, "keepdim")), outputs=outs)


def softmax(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Softmax", b.node("Cast", ins[0], to=KINDS[DType.f32]), axis=_attr(op, "axis"), outputs=outs)


def topk(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("TopK", ins[0], b.ints(_attr(op, "k")), axis=-1, largest=1, sorted=1, outputs=outs)


def moe_experts(b: Builder, op: Op, ins: list[str], outs: list[str]) -> None:
    """The weights of the chosen experts are gathered: T * k copies, so this is for steps of few tokens."""
    x, ids, weights, gate_up, down = ins
    hidden, inner = (int(d) for d in op.inputs[4].tensor.shape[1:])  # type: ignore[arg-type]
    column = b.reshape(x, -1, 1, hidden, 1)
    both = b.node("MatMul", b.node("Gather", gate_up, ids, axis=0), column)  # [T, k, 2I, 1]
    gate, up = b.slice(both, 2, 0, inner), b.slice(both, 2, inner)
    each = b.node("MatMul", b.node("Gather", down, ids, axis=0), b.node("Mul", b.silu(gate), up))  # [T, k, H, 1]
    scaled = b.node("Mul", each, b.node("Unsqueeze", weights, b.ints(2, 3)))
    b.reshape(b.node("ReduceSum", scaled, b.ints(1), keepdims=0), -1, hidden, outputs=outs)


ROWS: dict[str, Emit] = {
    **{name: simple(kind) for name, kind in SIMPLE.items()},
    "constant": constant, "reshape": reshape, "transpose": transpose, "slice": slice_, "concat": concat,
    "expand": expand, "linear": linear, "embedding": gather(1, 0), "gather_rows": gather(0, 1), "silu": silu,
    "rsqrt": rsqrt, "add_scalar": scalar("Add", "value"), "mul_scalar": scalar("Mul", "value"),
    "pow": scalar("Pow", "exponent"), "cast": cast, "mean": mean, "sum": total, "softmax": softmax, "topk": topk,
    "moe_experts": moe_experts,
}
