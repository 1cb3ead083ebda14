"""Bodies of the rows that need several standard ops and own no cache: norms, epilogues, rope, routing, experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcn_compile.errors import LoweringError
from qcn_compile.ir.graph import Op
from qcn_compile.ir.types import DType
from qcn_compile.onnx.builder import KINDS, Nodes

Body = Callable[[Nodes, Op, list[str], list[str]], None]
"""Writes the nodes that compute `outs` from `ins`: the operands in order, "" for one that is absent."""


def sizes(op: Op, index: int) -> tuple[int, ...]:
    """Shape of an operand; 0 for a symbolic size."""
    value = op.operands[index]
    assert value is not None
    return tuple(d if isinstance(d, int) else 0 for d in value.tensor.shape)


def normed(b: Nodes, x: str, w: str, eps: float) -> str:
    """x / sqrt(mean(x^2) + eps) * w over the last axis."""
    square = b.node("ReduceMean", b.node("Mul", x, x), b.ints(-1), keepdims=1)
    return b.node("Mul", b.node("Div", x, b.node("Sqrt", b.node("Add", square, b.scalar(eps)))), w)


def rms_norm(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Identity", normed(b, ins[0], ins[1], _number(op, "eps")), outputs=outs)


def add_rms_norm(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Add", ins[0], ins[1], outputs=outs[:1])
    b.node("Identity", normed(b, outs[0], ins[2], _number(op, "eps")), outputs=outs[1:])


def gated_rms_norm(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Mul", normed(b, ins[0], ins[2], _number(op, "eps")), b.silu(ins[1]), outputs=outs)


def linear_add(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Gemm", *ins, transB=1, outputs=outs)


def silu_mul(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Mul", b.silu(ins[0]), ins[1], outputs=outs)


def mul_sigmoid(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Mul", ins[0], b.node("Sigmoid", ins[1]), outputs=outs)


def gate_of(b: Nodes, a: str, decay: str, dt_bias: str) -> str:
    """decay * softplus(a + dt_bias)."""
    return b.node("Mul", decay, b.node("Softplus", b.node("Add", a, dt_bias)))


def delta_gate(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Identity", gate_of(b, *ins), outputs=outs)


def rope_table(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    positions = b.node("Unsqueeze", b.node("Cast", ins[0], to=KINDS[DType.f32]), b.ints(1))
    angle = b.node("Mul", positions, ins[1])
    for kind, out in zip(("Cos", "Sin"), outs, strict=True):
        b.node("Mul", b.node(kind, angle), b.scalar(_number(op, "scaling")), outputs=[out])


def rope(b: Nodes, x: str, cos: str, sin: str, half: int, depth: int) -> str:
    """The first 2*half dims of each head turned, halves paired. x [T, heads, depth], cos, sin [T, half]."""
    c, s = (b.node("Unsqueeze", t, b.ints(1)) for t in (cos, sin))
    first, second = b.slice(x, 2, 0, half), b.slice(x, 2, half, 2 * half)
    turned = [b.node("Sub", b.node("Mul", first, c), b.node("Mul", second, s)),
              b.node("Add", b.node("Mul", second, c), b.node("Mul", first, s))]
    return b.node("Concat", *turned, *([b.slice(x, 2, 2 * half)] if 2 * half < depth else []), axis=2)


def rope_row(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    x, cos, sin = ins
    b.node("Identity", rope(b, x, cos, sin, sizes(op, 1)[1], sizes(op, 0)[2]), outputs=outs)


def moe_route(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    experts, shared = sizes(op, 0)[1] - int(bool(op.attrs["shared"])), bool(op.attrs["shared"])
    chances = b.node("Softmax", b.slice(ins[0], 1, 0, experts), axis=-1)
    weights, ids = b.name("weights"), b.name("ids")
    b.node("TopK", chances, b.ints(int(_number(op, "top_k"))), axis=-1, largest=1, sorted=1, outputs=[weights, ids])
    if op.attrs["normalize"]:
        weights = b.node("Div", weights, b.node("ReduceSum", weights, b.ints(-1), keepdims=1))
    if shared:
        gate = b.slice(ins[0], 1, experts)
        weights = b.node("Concat", weights, b.node("Sigmoid", gate), axis=1)
        same = b.node("Expand", b.ints(experts), b.node("Shape", gate))
        ids = b.node("Concat", ids, same, axis=1)
    b.node("Cast", ids, to=KINDS[DType.i32], outputs=outs[:1])
    b.node("Identity", weights, outputs=outs[1:])


def experts(b: Nodes, op: Op, ins: list[str]) -> str:
    """The weights of the chosen experts are gathered: T * k copies, so this is for steps of few tokens."""
    if op.attrs["activation"] != "silu":
        raise LoweringError(f"{op.name} at {op.loc}: activation {op.attrs['activation']!r}; ONNX has silu only")
    x, ids, weights, gate_up, down = ins[:5]
    _, hidden, inner = sizes(op, 4)
    column = b.reshape(x, -1, 1, hidden, 1)
    both = b.node("MatMul", b.node("Gather", gate_up, ids, axis=0), column)  # [T, k, 2I, 1]
    gate, up = b.slice(both, 2, 0, inner), b.slice(both, 2, inner)
    each = b.node("MatMul", b.node("Gather", down, ids, axis=0), b.node("Mul", b.silu(gate), up))  # [T, k, H, 1]
    scaled = b.node("Mul", each, b.node("Unsqueeze", weights, b.ints(2, 3)))
    return b.reshape(b.node("ReduceSum", scaled, b.ints(1), keepdims=0), -1, hidden)


def moe_experts(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Identity", experts(b, op, ins), outputs=outs)


def moe_add(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    b.node("Add", ins[5], experts(b, op, ins), outputs=outs)


def _number(op: Op, key: str) -> float:
    value: Any = op.attrs[key]
    return float(value)


BODIES: dict[str, Body] = {
    "rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "gated_rms_norm": gated_rms_norm, "linear_add": linear_add,
    "silu_mul": silu_mul, "mul_sigmoid": mul_sigmoid, "delta_gate": delta_gate, "rope_table": rope_table,
    "rope": rope_row, "moe_route": moe_route, "moe_experts": moe_experts, "moe_add": moe_add}
