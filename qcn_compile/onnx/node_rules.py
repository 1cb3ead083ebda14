"""Standard ONNX ops as rows of the op table: a function from a node to the values of its outputs.

An output that is known now (a Constant) is an array instead; what reads it turns it into a weight or a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qcn_compile.ir.graph import Value
from qcn_compile.ir.types import Dim, Sym
from qcn_compile.onnx.builder import KINDS
from qcn_compile.onnx.rows import SIMPLE

if TYPE_CHECKING:
    from qcn_compile.onnx.read import Node

DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
Rule = Callable[["Node"], Sequence[Value | np.ndarray]]


def simple(row: str) -> Rule:
    """One op of that row on all inputs."""
    return lambda n: [n.build.one(row, [n.value(i) for i in range(len(n.inputs))])]


def with_scalar(row: str, scalar: str, attr: str) -> Rule:
    """`row`, or `scalar` when the second operand is one known number: what the exporter writes for it."""
    def rule(n: Node) -> list[Value]:
        number, x = n.array(1), n.value(0)
        if number is not None and number.size == 1 and number.ndim <= x.tensor.rank and x.tensor.dtype.is_float:
            return [n.build.one(scalar, [x], **{attr: float(number.reshape(()))})]
        if not row:
            raise n.fail("its second operand is no single known number", "write it with Mul")
        return [n.build.one(row, [x, n.value(1)])]

    return rule


def multiply(n: Node) -> list[Value]:
    """x * sigmoid(x) is silu(x)."""
    for x, other in ((0, 1), (1, 0)):
        if n.array(other) is None and (op := n.value(other).op) is not None and op.name == "sigmoid" \
                and n.array(x) is None and op.operands[0] is n.value(x):
            return [n.build.one("silu", [n.value(x)])]
    return list(with_scalar("mul", "mul_scalar", "value")(n))  # type: ignore[arg-type]


def reciprocal(n: Node) -> list[Value]:
    """1 / sqrt(x) is rsqrt(x)."""
    x = n.value(0)
    if x.op is not None and x.op.name == "pow" and x.op.attrs["exponent"] == 0.5:
        return [n.build.one("rsqrt", [x.op.operands[0]])]
    return [n.build.one("pow", [x], exponent=-1.0)]


def constant(n: Node) -> list[np.ndarray]:
    """The array of a Constant node."""
    from onnx import numpy_helper

    (key, value), = n.attrs.items()
    return [numpy_helper.to_array(value) if key == "value" else
            np.array(value, np.float32 if "float" in key else np.int64)]


def reshape(n: Node) -> list[Value]:
    """A 0 keeps the size, one -1 is what is left."""
    from qcn_compile.ir.ops.shape import resolve_shape

    x, wanted = n.value(0), n.ints(1) or []
    if n.attrs.get("allowzero") and 0 in wanted:
        raise n.fail("it asks for a size of zero", "drop the empty tensor")
    sizes: list[Dim] = [x.tensor.shape[i] if d == 0 else d for i, d in enumerate(wanted)]
    return [n.build.reshape(x, resolve_shape(x.tensor.shape, tuple(sizes)))]


def unsqueeze(n: Node) -> list[Value]:
    x, axes = n.value(0), n.ints(1, "axes") or []
    sizes, rank = list(x.tensor.shape), x.tensor.rank + len(axes)
    for axis in sorted(a % rank for a in axes):
        sizes.insert(axis, 1)
    return [n.build.reshape(x, tuple(sizes))]


def squeeze(n: Node) -> list[Value]:
    x = n.value(0)
    axes = n.ints(1, "axes") or [i for i, d in enumerate(x.tensor.shape) if d == 1]
    gone = {a % x.tensor.rank for a in axes}
    return [n.build.reshape(x, tuple(d for i, d in enumerate(x.tensor.shape) if i not in gone))]


def transpose(n: Node) -> list[Value]:
    """Any order, as exchanges of two axes."""
    x = n.value(0)
    order = list(n.attrs.get("perm", reversed(range(x.tensor.rank))))
    now = list(range(x.tensor.rank))
    for at, axis in enumerate(order):
        other = now.index(axis)
        now[at], now[other] = now[other], now[at]
        x = n.build.transpose(x, at, other)
    return [x]


def slice_(n: Node) -> list[Value]:
    x = n.value(0)
    starts, stops = n.ints(1, "starts") or [], n.ints(2, "ends") or []
    axes, steps = n.ints(3, "axes") or list(range(len(starts))), n.ints(4) or [1] * len(starts)
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        size = _static(n, x, axis)
        if step != 1:
            raise n.fail(f"step {step}", "only steps of 1 are in the op table")
        first, last = (max(0, min(size, v + size if v < 0 else v)) for v in (start, stop))
        x = n.build.slice(x, axis % x.tensor.rank, first, last)
    return [x]


def split(n: Node) -> list[Value]:
    x, axis = n.value(0), int(n.attrs.get("axis", 0))
    size = _static(n, x, axis)
    part = -(-size // len(n.outputs))
    parts = n.ints(1, "split") or [min(part, size - part * i) for i in range(len(n.outputs))]
    ends = np.cumsum(parts).tolist()
    return [n.build.slice(x, axis % x.tensor.rank, end - width, end) for end, width in zip(ends, parts, strict=True)]


def _static(n: Node, x: Value, axis: int) -> int:
    size = x.tensor.shape[axis]
    if isinstance(size, Sym):
        raise n.fail(f"axis {axis} of {x.type} has no fixed size", "export it with that size fixed")
    return size


def concat(n: Node) -> list[Value]:
    first = n.value(0)
    axis = int(n.attrs["axis"]) % first.tensor.rank
    for i in range(len(n.inputs)):
        _static(n, n.value(i), axis)
    return [n.build.one("concat", [n.value(i) for i in range(len(n.inputs))], axis=axis)]


def expand(n: Node) -> list[Value]:
    from qcn_compile.ir.ops.elementwise import broadcast

    x, sizes = n.value(0), tuple(n.ints(1) or [])
    shape = broadcast(x.tensor.shape, sizes)
    if shape != x.tensor.shape and any(isinstance(d, Sym) for d in shape):
        raise n.fail(f"{x.type} would grow beside a symbolic size", "use an op that broadcasts")
    return [x if shape == x.tensor.shape else n.build.one("expand", [x], shape=shape)]  # type: ignore[arg-type]


def gemm(n: Node) -> list[Value]:
    """A B (+ C), alpha and beta 1."""
    if n.attrs.get("transA") or any(n.attrs.get(key, 1.0) != 1.0 for key in ("alpha", "beta")):
        raise n.fail("transA, alpha or beta are set", "write it with MatMul, Transpose and Mul")
    w = n.value(1) if n.attrs.get("transB") else n.build.transpose(n.value(1), 0, 1)
    if n.has(2) and n.value(2).tensor.shape == w.tensor.shape[:1]:
        return [n.build.one("linear", [n.value(0), w, n.value(2)])]
    y = n.build.one("linear", [n.value(0), w])
    return [n.build.one("add", [y, n.value(2)]) if n.has(2) else y]


def matmul(n: Node) -> list[Value]:
    x, w = n.value(0), n.value(1)
    if w.tensor.rank != 2 or x.tensor.rank < 2:
        raise n.fail(f"{x.type} times {w.type}", "the op table multiplies with a matrix [K, N] only")
    return [n.build.one("linear", [x, n.build.transpose(w, 0, 1)])]


def gather(n: Node) -> list[Value]:
    """Rows of a table of the file are an embedding, rows of anything else a gather."""
    table, rows = n.value(0), n.value(1)
    if int(n.attrs.get("axis", 0)) % table.tensor.rank:
        raise n.fail("only rows (axis 0) can be gathered", "transpose first")
    if table.op is not None and table.op.name in ("weight", "constant") and table.tensor.rank == 2:
        return [n.build.one("embedding", [rows, table])]
    if rows.tensor.rank != 1:
        raise n.fail(f"indices {rows.type}", "give them as a vector")
    return [n.build.one("gather_rows", [table, rows])]


def cast(n: Node) -> list[Value]:
    if n.attrs["to"] not in DTYPES:
        raise n.fail(f"element type {n.attrs['to']}", f"the IR has {', '.join(d.value for d in KINDS)}")
    return [n.build.cast(n.value(0), DTYPES[n.attrs["to"]])]


def reduce(row: str) -> Rule:
    """mean or sum over one axis."""
    def rule(n: Node) -> list[Value]:
        axes, x = n.ints(1, "axes"), n.value(0)
        if axes is None or len(axes) != 1:
            raise n.fail(f"axes {axes}", "reduce one axis after the other")
        keep = bool(n.attrs.get("keepdims", 1))
        return [n.build.one(row, [x], axis=axes[0] if axes[0] < 0 else axes[0] - x.tensor.rank, keepdim=keep)]

    return rule


def softmax(n: Node) -> list[Value]:
    x = n.value(0)
    return [n.build.one("softmax", [x], axis=int(n.attrs.get("axis", -1)), dtype=x.tensor.dtype)]


def topk(n: Node) -> list[Value]:
    x, k = n.value(0), n.ints(1) or []
    if int(n.attrs.get("axis", -1)) % x.tensor.rank != x.tensor.rank - 1 or not n.attrs.get("largest", 1):
        raise n.fail("not the largest of the last axis", "transpose or negate first")
    return n.build.emit("topk", [x], k=k[0])


def rms_norm(n: Node) -> list[Value]:
    if int(n.attrs.get("axis", -1)) % n.value(0).tensor.rank != n.value(0).tensor.rank - 1:
        raise n.fail("it normalises more than the last axis", "reshape first")
    return [n.build.one("rms_norm", [n.value(0), n.value(1)], eps=float(n.attrs.get("epsilon", 1e-5)))]


def power(exponent: float) -> Rule:
    """x ** exponent."""
    return lambda n: [n.build.one("pow", [n.value(0)], exponent=exponent)]


def same(n: Node) -> list[Any]:
    """Identity: another name."""
    found = n.array(0)
    return [n.value(0) if found is None else found]


RULES: dict[str, Rule] = {
    **{kind: simple(row) for row, kind in SIMPLE.items()},
    "Add": with_scalar("add", "add_scalar", "value"), "Mul": multiply, "Pow": with_scalar("", "pow", "exponent"),
    "Sqrt": power(0.5), "Reciprocal": reciprocal, "Identity": same, "Constant": constant, "Reshape": reshape,
    "Unsqueeze": unsqueeze, "Squeeze": squeeze, "Transpose": transpose, "Slice": slice_, "Split": split,
    "Concat": concat, "Expand": expand, "Gemm": gemm, "MatMul": matmul, "Gather": gather, "Cast": cast,
    "ReduceMean": reduce("mean"), "ReduceSum": reduce("sum"), "Softmax": softmax, "TopK": topk,
    "RMSNormalization": rms_norm, "SimplifiedLayerNormalization": rms_norm,
}
