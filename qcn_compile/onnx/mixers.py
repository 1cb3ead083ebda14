"""The rows that own caches, for one sequence: attention, causal convolution, gated delta rule.

Each takes the names of its past states and returns those of its present ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import TensorProto, helper

from qcn_compile.errors import LoweringError
from qcn_compile.ir.graph import Op
from qcn_compile.ir.ops.deltanet import L2_EPS
from qcn_compile.onnx.builder import Builder

Mix = Callable[[Builder, Op, list[str], list[str], list[str]], list[str]]


def attention(b: Builder, op: Op, ins: list[str], outs: list[str], past: list[str]) -> list[str]:
    """past and present: keys and values [1, Hkv, tokens so far, D]. Query i sees keys 0 .. past + i."""
    if not op.attrs["causal"]:
        raise LoweringError(f"attention at {op.loc}: only causal attention is written as ONNX")
    q, k, v = ins[:3]
    (heads, depth), (kv, width) = (tuple(map(int, x.tensor.shape[1:])) for x in (op.inputs[0], op.inputs[2]))  # type: ignore[arg-type]
    new = [b.node("Unsqueeze", b.node("Transpose", x, perm=[1, 0, 2]), b.ints(0)) for x in (k, v)]
    keys, values = (b.node("Concat", old, x, axis=2) for old, x in zip(past, new, strict=True))
    query = b.node("Transpose", b.node("Mul", q, b.scalar(float(op.attrs["scale"]))), perm=[1, 0, 2])  # type: ignore[arg-type]
    query = b.reshape(query, kv, heads // kv, -1, depth)
    scores = b.node("MatMul", query, b.node("Transpose", keys, perm=[1, 0, 3, 2]))  # [Hkv, Hq/Hkv, T, M]
    weights = b.node("Softmax", b.node("Add", scores, _mask(b, past[0], keys)), axis=-1)
    mixed = b.node("MatMul", weights, b.node("Transpose", values, perm=[1, 0, 2, 3]))
    b.node("Transpose", b.reshape(mixed, heads, -1, width), perm=[1, 0, 2], outputs=outs)
    return [keys, values]


def _mask(b: Builder, past: str, keys: str) -> str:
    """0 where key j <= past + i, -infinity elsewhere: [T, M]."""
    before, total = (b.node("Gather", b.node("Shape", x), b.ints(2)) for x in (past, keys))
    scalar = [b.node("Squeeze", x) for x in (before, total)]
    zero, one = (b.node("Squeeze", b.ints(n)) for n in (0, 1))
    row = b.node("Unsqueeze", b.node("Range", scalar[0], scalar[1], one), b.ints(1))
    column = b.node("Unsqueeze", b.node("Range", zero, scalar[1], one), b.ints(0))
    return b.node("Where", b.node("LessOrEqual", column, row), b.scalar(0.0), b.scalar(float("-inf")))


def causal_conv1d(b: Builder, op: Op, ins: list[str], outs: list[str], past: list[str]) -> list[str]:
    """past and present: the last W-1 inputs [1, C, W-1]."""
    channels, taps = (int(d) for d in op.inputs[1].tensor.shape)  # type: ignore[arg-type]
    x = b.node("Unsqueeze", b.node("Transpose", ins[0], perm=[1, 0]), b.ints(0))
    full = b.node("Concat", past[0], x, axis=2)
    y = b.node("Conv", full, b.reshape(ins[1], channels, 1, taps), *ins[2:], group=channels)
    y = b.silu(y) if op.attrs.get("activation") == "silu" else y
    b.node("Transpose", b.node("Squeeze", y, b.ints(0)), perm=[1, 0], outputs=outs)
    return [b.slice(full, 2, 1 - taps)]


def gated_delta_rule(b: Builder, op: Op, ins: list[str], outs: list[str], past: list[str]) -> list[str]:
    """past and present: S [1, Hv, Dk, Dv]. A Scan over the tokens; see `ir.ops.deltanet.delta_rule`."""
    q, k, v, g, beta = ins[:5]
    key_heads, depth = (int(d) for d in op.inputs[1].tensor.shape[1:])  # type: ignore[arg-type]
    heads = int(op.inputs[2].tensor.shape[1])  # type: ignore[arg-type]
    if op.attrs["qk_l2norm"]:
        q, k = _unit(b, q), _unit(b, k)
    q = b.node("Mul", q, b.scalar(depth ** -0.5))
    if heads != key_heads:
        q, k = (_repeat(b, x, key_heads, heads // key_heads, depth) for x in (q, k))
    final = b.name("state")
    b.node("Scan", b.node("Squeeze", past[0], b.ints(0)), q, k, v, g, beta, outputs=[final, *outs],
           num_scan_inputs=5, body=_step())
    return [b.node("Unsqueeze", final, b.ints(0))]


def _unit(b: Builder, x: str) -> str:
    square = b.node("ReduceSum", b.node("Mul", x, x), b.ints(2), keepdims=1)
    return b.node("Div", x, b.node("Sqrt", b.node("Add", square, b.scalar(L2_EPS))))


def _repeat(b: Builder, x: str, heads: int, times: int, depth: int) -> str:
    """Each head `times` times in a row."""
    wide = b.node("Expand", b.node("Unsqueeze", x, b.ints(2)), b.ints(1, 1, times, 1))
    return b.reshape(wide, -1, heads * times, depth)


def _step() -> Any:
    """One token: S, q, k [H, Dk], v [H, Dv], g, beta [H] -> new S, output [H, Dv]."""
    axes = {name: helper.make_tensor(name, TensorProto.INT64, [len(v)], v)
            for name, v in {"last": [-1], "middle": [1], "both": [1, 2]}.items()}
    nodes = [("Exp", ["g"], "decay"), ("Unsqueeze", ["decay", "both"], "decay3"), ("Mul", ["s", "decay3"], "faded"),
             ("Unsqueeze", ["k", "middle"], "row"), ("MatMul", ["row", "faded"], "seen3"),
             ("Squeeze", ["seen3", "middle"], "seen"), ("Sub", ["v", "seen"], "error"),
             ("Unsqueeze", ["beta", "last"], "rate"), ("Mul", ["error", "rate"], "delta"),
             ("Unsqueeze", ["k", "last"], "column"), ("Unsqueeze", ["delta", "middle"], "delta3"),
             ("Mul", ["column", "delta3"], "outer"), ("Add", ["faded", "outer"], "next"),
             ("Unsqueeze", ["q", "middle"], "query"), ("MatMul", ["query", "next"], "out3"),
             ("Squeeze", ["out3", "middle"], "out")]
    made = [helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None)  # noqa: E731
    return helper.make_graph(made, "delta_rule", [value(n) for n in ("s", "q", "k", "v", "g", "beta")],
                             [value("next"), value("out")], list(axes.values()))


MIXERS: dict[str, Mix] = {"attention": attention, "causal_conv1d": causal_conv1d, "gated_delta_rule": gated_delta_rule}
