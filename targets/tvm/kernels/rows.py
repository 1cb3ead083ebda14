"""Row by row kernels: pointwise ops, concatenation, gathers and look-ups."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from qcn_compile.targets.tvm.kernels import math
from qcn_compile.targets.tvm.kernels.core import Array, Expr, Function, Machine, f32, lanes_of, let, splat, wide
from qcn_compile.targets.tvm.kernels.loops import copy_row, count, each, sweep

UNARY: dict[str, Callable[[Expr], Expr]] = {
    "neg": lambda x: f32(0.0, lanes_of(x)) - x,
    "exp": lambda x: math.exp(x, full_range=True),
    "sigmoid": math.sigmoid,
    "silu": math.silu,
    "softplus": math.softplus,
    "rsqrt": lambda x: f32(1.0, lanes_of(x)) / T.sqrt(x),
}
BINARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
    "div": lambda a, b: a / b,
    "silu_mul": lambda a, b: math.silu(a) * b,
    "mul_sigmoid": lambda a, b: a * math.sigmoid(b),
}
SCALAR: dict[str, Callable[[Expr, float], Expr]] = {
    "add_scalar": lambda x, value: x + f32(value, lanes_of(x)),
    "mul_scalar": lambda x, value: x * f32(value, lanes_of(x)),
}


def unary(symbol: str, m: Machine, *, op: str, rows: str, times: int, width: int, stride: int, threads: bool,
          value: float = 0.0) -> Function:
    """y = op(x), x [rows, width] -> y [rows, width]."""
    f = Function(symbol, x="float32", y="float32", counts="int32")
    with f as a, each("t", count(a, rows, times), threads) as t:
        def body(i: Expr, n: int) -> None:
            x = a.x[t * (stride or width) + i, n]
            a.y[t * width + i, n] = SCALAR[op](x, value) if op in SCALAR else UNARY[op](x)

        sweep(width, m.lanes, body)
    return f


def binary(symbol: str, m: Machine, *, op: str, rows: str, times: int, width: int, stride_a: int, stride_b: int,
           shape_a: str, shape_b: str, threads: bool) -> Function:
    """y = op(a, b). Each operand is `full` [rows, width], `row` [width], `column` [rows, 1] or `one` value."""
    f = Function(symbol, a="float32", b="float32", y="float32", counts="int32")
    with f as args, each("t", count(args, rows, times), threads) as t:
        def body(i: Expr, n: int) -> None:
            left = _read(args.a, shape_a, t, stride_a, width, i, n)
            right = _read(args.b, shape_b, t, stride_b, width, i, n)
            args.y[t * width + i, n] = BINARY[op](left, right)

        sweep(width, m.lanes, body)
    return f


def _read(x: Array, shape: str, row: Expr, stride: int, width: int, i: Expr, n: int) -> Expr:
    """An operand of a broadcasting op at row `row`, elements i .. i+n."""
    if shape == "full":
        return x[row * (stride or width) + i, n]
    if shape == "row":
        return x[i, n]
    return splat(x[row * (stride or 1) if shape == "column" else 0], n)


def concat(symbol: str, m: Machine, *, rows: str, times: int, widths: str, strides: str, threads: bool) -> Function:
    """Rows side by side: y[t] = x0[t] | x1[t] | ... `widths` and `strides` are numbers joined by x."""
    sizes = [int(w) for w in widths.split("x")]
    steps = [int(s) or w for s, w in zip(strides.split("x"), sizes, strict=True)]
    names = [f"x{j}" for j in range(len(sizes))]
    f = Function(symbol, **dict.fromkeys(names, "float32"), y="float32", counts="int32")
    with f as a, each("t", count(a, rows, times), threads) as t:
        for j, (size, step) in enumerate(zip(sizes, steps, strict=True)):
            copy_row(getattr(a, names[j]), t * step, a.y, t * sum(sizes) + sum(sizes[:j]), size, m.lanes)
    return f


def gather_rows(symbol: str, m: Machine, *, rows: str, width: int, stride: int) -> Function:
    """y[i] = x[index[i]]."""
    f = Function(symbol, x="float32", index="int32", y="float32", counts="int32")
    with f as a, each("r", count(a, rows), False) as r:
        copy_row(a.x, let("source", a.index[r]) * (stride or width), a.y, r * width, width, m.lanes)
    return f


def embedding(symbol: str, m: Machine, *, rows: str, width: int, vocab: int, format: str, threads: bool,
              first: int = -1) -> Function:
    """y[t] = table[ids[t]], table [vocab, width] in f32 or bf16. An id outside the table reads its nearest row; with
    `first` >= 0 the table is a part that starts with that id, and an id outside of it gives zeros."""
    f = Function(symbol, ids="int32", table="float32" if format == "f32" else "uint16", y="float32", counts="int32")
    with f as a, each("t", count(a, rows), threads) as t:
        wanted = let("wanted", a.ids[t] - max(first, 0))
        row = let("id", T.max(T.min(wanted, vocab - 1), 0))
        there = let("there", T.Select(wanted == row, T.float32(1.0), T.float32(0.0)))

        def body(i: Expr, n: int) -> None:
            x = a.table[wide(row) * width + i, n]
            value = x if format == "f32" else math.widen(x)
            a.y[t * width + i, n] = value if first < 0 else value * splat(there, n)

        sweep(width, m.lanes, body)
    return f
