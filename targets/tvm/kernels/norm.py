"""Normalisation kernels: one row at a time, two passes over a row that stays in the first cache."""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from qcn_compile.targets.tvm.kernels import math
from qcn_compile.targets.tvm.kernels.core import Array, Expr, Function, Machine, let, splat
from qcn_compile.targets.tvm.kernels.loops import count, each, reduce_row, row_start, sweep


def inverse_rms(x: Array, start: Expr, width: int, eps: float, m: Machine) -> Expr:
    """1 / sqrt(mean(x[start:start+width]^2) + eps)."""
    def term(i: Expr, n: int) -> Expr:
        v = let("v", x[start + i, n])
        return v * v

    square = reduce_row("square", width, m.lanes, term)
    return let("scale", T.float32(1.0) / T.sqrt(square * T.float32(1.0 / width) + T.float32(eps)))


def rms_norm(symbol: str, m: Machine, *, rows: str, times: int, heads: int, width: int, stride: int, eps: float,
             threads: bool) -> Function:
    """y = x / sqrt(mean(x^2) + eps) * w over rows of [rows, heads, width]."""
    f = Function(symbol, x="float32", w="float32", y="float32", counts="int32")
    with f as a, each("row", count(a, rows, times * heads), threads) as row:
        start = row_start(row, width, heads, stride)
        scale = inverse_rms(a.x, start, width, eps, m)

        def body(i: Expr, n: int) -> None:
            a.y[row * width + i, n] = a.x[start + i, n] * splat(scale, n) * a.w[i, n]

        sweep(width, m.lanes, body)
    return f


def add_rms_norm(symbol: str, m: Machine, *, rows: str, width: int, stride_x: int, stride_r: int, eps: float,
                 threads: bool) -> Function:
    """s = x + r, y = rms_norm(s, w)."""
    f = Function(symbol, x="float32", r="float32", w="float32", s="float32", y="float32", counts="int32")
    with f as a, each("t", count(a, rows), threads) as t:
        def add(i: Expr, n: int) -> None:
            a.s[t * width + i, n] = a.x[t * (stride_x or width) + i, n] + a.r[t * (stride_r or width) + i, n]

        sweep(width, m.lanes, add)
        scale = inverse_rms(a.s, t * width, width, eps, m)

        def body(i: Expr, n: int) -> None:
            a.y[t * width + i, n] = a.s[t * width + i, n] * splat(scale, n) * a.w[i, n]

        sweep(width, m.lanes, body)
    return f


def gated_rms_norm(symbol: str, m: Machine, *, rows: str, times: int, heads: int, width: int, stride_x: int,
                   stride_z: int, eps: float, threads: bool) -> Function:
    """y = rms_norm(x, w) * silu(z) over rows of [rows, heads, width]."""
    f = Function(symbol, x="float32", z="float32", w="float32", y="float32", counts="int32")
    with f as a, each("row", count(a, rows, times * heads), threads) as row:
        start, gate = row_start(row, width, heads, stride_x), row_start(row, width, heads, stride_z)
        scale = inverse_rms(a.x, start, width, eps, m)

        def body(i: Expr, n: int) -> None:
            a.y[row * width + i, n] = (a.x[start + i, n] * splat(scale, n) * a.w[i, n]) * math.silu(a.z[gate + i, n])

        sweep(width, m.lanes, body)
    return f
