"""Bodies of the rows that own caches, for one sequence: attention, causal convolution, gated delta rule.

Their inputs are the row's operands, then the parts of its caches; their outputs its results, then the parts it wrote.
"""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, helper

from qcn_compile.errors import LoweringError
from qcn_compile.ir.graph import Op
from qcn_compile.ir.ops.deltanet import L2_EPS
from qcn_compile.onnx.bodies import Body, gate_of, normed, rope, sizes
from qcn_compile.onnx.builder import Nodes


def attention(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    """q, k, v, past keys and values -> output, present keys and values [1, Hkv, tokens so far, D]."""
    if not op.attrs["causal"]:
        raise LoweringError(f"attention at {op.loc}: only causal attention is written as ONNX")
    q, k, v, *past = ins
    _append(b, [k, v], past, outs[1:])
    b.node("Identity", _attend(b, op, q, outs[1:]), outputs=outs[:1])


def rope_append(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    """q, k, v, q_w?, k_w?, cos, sin, past keys and values -> query, present keys and values."""
    q, k, v, q_w, k_w, cos, sin, *past = ins
    eps, half = float(op.attrs["eps"]), sizes(op, 5)[1]  # type: ignore[arg-type]
    q, k = (normed(b, x, w, eps) if w else x for x, w in ((q, q_w), (k, k_w)))
    b.node("Identity", rope(b, q, cos, sin, half, sizes(op, 0)[2]), outputs=outs[:1])
    _append(b, [rope(b, k, cos, sin, half, sizes(op, 1)[2]), v], past, outs[1:])


def paged_attention(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    """q, gate?, keys and values, this step's included -> output [T, Hq*D]."""
    q, gate, *kv = ins
    _, heads, depth = sizes(op, 0)
    mixed = b.reshape(_attend(b, op, q, kv), -1, heads * depth)
    b.node("Mul", mixed, b.node("Sigmoid", gate) if gate else b.scalar(1.0), outputs=outs)


def _append(b: Nodes, fresh: list[str], past: list[str], outs: list[str]) -> None:
    """Rows [T, Hkv, D] behind caches [1, Hkv, P, D]."""
    for x, old, out in zip(fresh, past, outs, strict=True):
        b.node("Concat", old, b.node("Unsqueeze", b.node("Transpose", x, perm=[1, 0, 2]), b.ints(0)), axis=2,
               outputs=[out])


def _attend(b: Nodes, op: Op, q: str, kv: list[str]) -> str:
    """[T, Hq, D] of the last T of M tokens: query i sees keys 0 .. M - T + i."""
    (keys, values), (_, heads, depth) = kv, sizes(op, 0)
    query = b.node("Transpose", b.node("Mul", q, b.scalar(float(op.attrs["scale"]))), perm=[1, 0, 2])  # type: ignore[arg-type]
    shape = b.node("Concat", _length(b, keys, 1), b.ints(-1), _length(b, q, 0), b.ints(depth), axis=0)
    parted = b.node("Reshape", query, shape)  # [Hkv, Hq/Hkv, T, D]
    scores = b.node("MatMul", parted, b.node("Transpose", keys, perm=[1, 0, 3, 2]))  # [Hkv, Hq/Hkv, T, M]
    weights = b.node("Softmax", b.node("Add", scores, _mask(b, q, keys)), axis=-1)
    mixed = b.node("MatMul", weights, b.node("Transpose", values, perm=[1, 0, 2, 3]))
    whole = b.node("Reshape", mixed, b.node("Concat", b.ints(heads), _length(b, q, 0), b.ints(-1), axis=0))
    return b.node("Transpose", whole, perm=[1, 0, 2])


def _length(b: Nodes, x: str, axis: int) -> str:
    """i64 [1]: the size of an axis."""
    return b.node("Gather", b.node("Shape", x), b.ints(axis))


def _mask(b: Nodes, q: str, keys: str) -> str:
    """0 where key j <= M - T + i, -infinity elsewhere: [T, M]."""
    total = _length(b, keys, 2)
    scalar = [b.node("Squeeze", x) for x in (b.node("Sub", total, _length(b, q, 0)), total)]
    zero, one = (b.node("Squeeze", b.ints(n)) for n in (0, 1))
    row = b.node("Unsqueeze", b.node("Range", scalar[0], scalar[1], one), b.ints(1))
    column = b.node("Unsqueeze", b.node("Range", zero, scalar[1], one), b.ints(0))
    return b.node("Where", b.node("LessOrEqual", column, row), b.scalar(0.0), b.scalar(float("-inf")))


def causal_conv1d(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    """x, w, bias?, the last W-1 inputs [1, C, W-1] -> output, the same."""
    x, w, bias, past = ins
    y, kept = _convolved(b, x, w, past, sizes(op, 1), [bias] if bias else [])
    b.node("Transpose", b.silu(y) if op.attrs.get("activation") == "silu" else y, perm=[1, 0], outputs=outs[:1])
    b.node("Identity", kept, outputs=outs[1:])


def _convolved(b: Nodes, x: str, w: str, past: str, shape: tuple[int, ...], bias: list[str]) -> tuple[str, str]:
    """[C, T] of x [T, C] and w [C, W], and the last inputs."""
    channels, taps = shape
    full = b.node("Concat", past, b.node("Unsqueeze", b.node("Transpose", x, perm=[1, 0]), b.ints(0)), axis=2)
    y = b.node("Conv", full, b.reshape(w, channels, 1, taps), *bias, group=channels)
    return b.node("Squeeze", y, b.ints(0)), b.slice(full, 2, 1 - taps)


def gated_delta_rule(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    """q, k, v, g, beta, S [1, Hv, Dk, Dv] -> output, S."""
    q, k, v, g, beta, past = ins
    _, key_heads, depth = sizes(op, 1)
    heads = sizes(op, 2)[1]
    _rule(b, [q, k, v, g, beta], past, (key_heads, heads, depth), bool(op.attrs["qk_l2norm"]), outs)


def _rule(b: Nodes, given: list[str], past: str, dims: tuple[int, int, int], unit: bool, outs: list[str]) -> None:
    """A Scan over the tokens; see `ir.ops.deltanet.delta_rule`. outs: output [T, Hv, Dv], final S [1, Hv, Dk, Dv]."""
    q, k, v, g, beta = given
    key_heads, heads, depth = dims
    q, k = (_unit(b, x) if unit else x for x in (q, k))
    q = b.node("Mul", q, b.scalar(depth ** -0.5))
    if heads != key_heads:
        q, k = (_repeat(b, x, key_heads, heads // key_heads, depth) for x in (q, k))
    final = b.name("state")
    b.node("Scan", b.node("Squeeze", past, b.ints(0)), q, k, v, g, beta, outputs=[final, outs[0]],
           num_scan_inputs=5, body=_step())
    b.node("Unsqueeze", final, b.ints(0), outputs=outs[1:])


def delta_net(b: Nodes, op: Op, ins: list[str], outs: list[str]) -> None:
    """The operands of the row, conv [1, C, W-1] and S [1, Hv, Dk, Dv] -> output, conv, S."""
    qkv, z, beta, a, conv_w, decay, dt_bias, norm_w, conv, delta = ins
    key_heads, heads, depth, width = (int(op.attrs[k]) for k in ("key_heads", "value_heads", "key_dim", "value_dim"))  # type: ignore[arg-type]
    y, kept = _convolved(b, qkv, conv_w, conv, sizes(op, 4), [])
    mixed, keys = b.node("Transpose", b.silu(y), perm=[1, 0]), key_heads * depth
    q, k = (b.reshape(b.slice(mixed, 1, at, at + keys), -1, key_heads, depth) for at in (0, keys))
    v = b.reshape(b.slice(mixed, 1, 2 * keys), -1, heads, width)
    mixed = b.name("mixed")
    _rule(b, [q, k, v, gate_of(b, a, decay, dt_bias), b.node("Sigmoid", beta)], delta, (key_heads, heads, depth), True,
          [mixed, outs[2]])
    gate = b.silu(b.reshape(z, -1, heads, width))
    gated = b.node("Mul", normed(b, mixed, norm_w, float(op.attrs["eps"])), gate)  # type: ignore[arg-type]
    b.reshape(gated, -1, heads * width, outputs=outs[:1])
    b.node("Identity", kept, outputs=outs[1:2])


def _unit(b: Nodes, x: str) -> str:
    square = b.node("ReduceSum", b.node("Mul", x, x), b.ints(2), keepdims=1)
    return b.node("Div", x, b.node("Sqrt", b.node("Add", square, b.scalar(L2_EPS))))


def _repeat(b: Nodes, x: str, heads: int, times: int, depth: int) -> str:
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


MIXERS: dict[str, Body] = {
    "attention": attention, "rope_append": rope_append, "paged_attention": paged_attention,
    "causal_conv1d": causal_conv1d, "gated_delta_rule": gated_delta_rule, "delta_net": delta_net}
