"""Rules of the leaf ops: transformers' layouts become [T, heads, D], handles become states, cu_seqlens the batch."""

from __future__ import annotations

from typing import Any

from qcn_compile.errors import IRError
from qcn_compile.frontend.aten_rules import Call, Result
from qcn_compile.ir.graph import Value
from qcn_compile.ir.types import DType, StateKind, StateRef, StateType


def _state(c: Call, kind: StateKind, dtype: DType, shape: tuple[Any, ...], path: str) -> StateRef:
    return c.build.state(f"{kind.value}.{path}", StateType(kind, dtype, shape))


def _heads_inside(c: Call, name: str) -> Value:
    """[1, heads, T, D] -> [T, heads, D]."""
    return c.build.transpose(c.batchless(name), 0, 1)


def attention(c: Call, path: str) -> Result:
    """q, k, v [1, heads, T, D] -> [T, heads, D]."""
    q, k, v = (_heads_inside(c, name) for name in "qkv")
    if k.type != v.type:
        raise IRError(f"keys {k.type} and values {v.type} differ in type; the cache holds both in one")
    state = _state(c, StateKind.kv, k.tensor.dtype, k.tensor.shape[1:], path)
    return c.build.one("attention", [q, k, v, c.self("cu_seqlens")], scale=float(c.args["scale"]),
                       causal=bool(c.args["causal"]), state=state)


def causal_conv1d(c: Call, path: str) -> Result:
    """x [1, C, T] -> [C, T]."""
    x = c.build.transpose(c.batchless("x"), 0, 1)
    w, bias = c.self("weight"), c.args["bias"]
    channels, width = w.tensor.shape
    state = _state(c, StateKind.conv, x.tensor.dtype, (channels, int(width) - 1), path)  # type: ignore[arg-type]
    operands = [x, w, None if bias is None else c.value(bias), c.self("cu_seqlens")]
    y = c.build.one("causal_conv1d", operands, activation=c.args["activation"], state=state)
    return c.build.transpose(y, 0, 1)


def gated_delta_rule(c: Call, path: str) -> Result:
    """q, k [1, T, Hk, Dk], v [1, T, Hv, Dv], g, beta [1, T, Hv] -> [T, Hv, Dv]."""
    q, k, v, g, beta = (c.batchless(name) for name in ("q", "k", "v", "g", "beta"))
    shape = (v.tensor.shape[1], k.tensor.shape[2], v.tensor.shape[2])
    state = _state(c, StateKind.delta, DType.f32, shape, path)
    return c.build.one("gated_delta_rule", [q, k, v, g, beta, c.self("cu_seqlens")],
                       qk_l2norm=bool(c.args["qk_l2norm"]), state=state)


def moe_experts(c: Call, path: str) -> Result:
    """x [T, H], ids, weights [T, k]: already flat."""
    operands: list[Value | None] = [c.self(name) for name in ("x", "ids", "weights", "gate_up", "down")]
    return c.build.one("moe_experts", operands, activation=c.args["activation"])


LEAVES = {"attention": attention, "causal_conv1d": causal_conv1d, "gated_delta_rule": gated_delta_rule,
          "moe_experts": moe_experts}
