"""A tile of 16 output rows times a few rows of x: the inner loops of `linear` and of the experts.

The sum over K runs in one chain, in order, whatever the number of rows: a token gets the same bits alone or in a
batch.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from qcn_compile.targets.tvm.kernels import math
from qcn_compile.targets.tvm.kernels.core import (
    Array,
    Arrays,
    Expr,
    Machine,
    f32,
    i32,
    let,
    local,
    loop,
    prefetch,
    splat,
    vector,
    wide,
)

TILE, GROUP = 16, 32
AHEAD = 1024  # bytes of weights asked for before they are needed
CODES = {"f32": "float32", "bf16": "uint16", "int8": "int8", "int4": "uint8"}


def weight_params(format: str) -> dict[str, str]:
    """Kernel parameters of a weight: codes, and scales when it has them."""
    return {"w": CODES[format]} | ({"s": "uint16"} if format in ("int8", "int4") else {})


def input_params(activations: str) -> dict[str, str]:
    """Kernel parameters of x: f32 rows, or int8 codes (four to an int32), scales, and zero point terms."""
    return {"x": "float32"} if activations == "f32" else {"xq": "int32", "xs": "float32", "xm": "float32"}


class Tile:
    """Multiplies tile `index` of a weight with rows of x; `acc` is [rows, 16]."""

    def __init__(self, a: Arrays, m: Machine, depth: int, format: str, activations: str, w: str = "w",
                 s: str = "s") -> None:
        self.a, self.m, self.depth, self.format, self.activations = a, m, depth, format, activations
        self.w: Array = getattr(a, w)
        self.coded = format in ("int8", "int4")
        self.s: Array = getattr(a, s) if self.coded else self.w
        self.groups = -(-depth // GROUP)

    def multiply(self, index: Expr, rows: list[Expr], stride: int, acc: Array) -> None:
        """acc[r] = W[tile] x[rows[r]] for every r; `stride` between f32 rows of x, 0 when dense."""
        for r in range(len(rows)):
            acc[r * TILE, TILE] = f32(0.0, TILE)
        if self.activations == "int8":
            self._integer(index, rows, acc)
        else:
            starts = [let(f"x{r}", row * (stride or self.depth)) for r, row in enumerate(rows)]
            self._float(index, starts, acc)

    # ---- f32 activations: widen or dequantise in registers ----

    def _float(self, index: Expr, starts: list[Expr], acc: Array) -> None:
        if not self.coded:
            base = let("base", wide(index) * (self.depth * TILE))
            unroll = 4 if len(starts) == 1 else 2
            self._steps(0, self.depth, unroll, lambda k: self._plain(base, k), starts, acc)
            return
        base = let("base", wide(index) * (self.groups * GROUP * TILE // (2 if self.format == "int4" else 1)))
        full = self.depth // GROUP
        if full:
            with loop("g", full) as g:
                self._group(index, base, g, GROUP, starts, acc)
        if self.depth % GROUP:
            self._group(index, base, full, self.depth % GROUP, starts, acc)

    def _steps(self, first: Expr, count: int, unroll: int, weights: Callable[[Expr], list[Expr]], starts: list[Expr],
               acc: Array) -> None:
        """acc += w(k) x[k] for k in first .. first+count, `unroll` at a time."""
        def step(k: Expr) -> None:
            lanes, w = self.m.lanes, weights(k)
            for r, start in enumerate(starts):
                x = splat(let("xk", self.a.x[start + k]), lanes)
                for v in range(TILE // lanes):
                    at = r * TILE + v * lanes
                    acc[at, lanes] = T.fma(w[v], x, acc[at, lanes])

        if count >= unroll:
            with loop("k", count // unroll) as k:
                for u in range(unroll):
                    step(first + k * unroll + u)
        for u in range(count % unroll):
            step(first + count // unroll * unroll + u)

    def _plain(self, base: Expr, k: Expr) -> list[Expr]:
        lanes = self.m.lanes
        at = let("at", base + k * TILE)
        prefetch(self.w, at + AHEAD // (4 if self.format == "f32" else 2))
        raw = [self.w[at + v * lanes, lanes] for v in range(TILE // lanes)]
        return [let(f"w{v}", r if self.format == "f32" else math.widen(r)) for v, r in enumerate(raw)]

    def _group(self, index: Expr, base: Expr, g: Expr, count: int, starts: list[Expr], acc: Array) -> None:
        lanes = self.m.lanes
        scales = self._scales(index, g)

        def weights(k: Expr) -> list[Expr]:
            result = []
            for v in range(TILE // lanes):
                code = self._code(base, k, v)
                result.append(let(f"w{v}", T.Cast(vector("float32", lanes), code) * scales[v]))
            return result

        self._steps(g * GROUP, count, 2, weights, starts, acc)

    def _code(self, base: Expr, k: Expr, v: int) -> Expr:
        """Codes of input k for the v-th vector of rows, as int32."""
        lanes = self.m.lanes
        if self.format == "int8":
            return T.Cast(vector("int32", lanes), self.w[base + k * TILE + v * lanes, lanes])
        byte = T.Cast(vector("int32", lanes), self.w[base + T.floordiv(k, 2) * TILE + v * lanes, lanes])
        nibble = T.bitwise_and(T.shift_right(byte, splat(T.floormod(k, 2) * 4, lanes)), i32(15, lanes))
        return nibble - i32(8, lanes)

    def _scales(self, index: Expr, g: Expr, lanes: int = 0) -> list[Expr]:
        lanes = lanes or self.m.lanes
        at = let("sat", wide(index) * (self.groups * TILE) + g * TILE)
        return [let(f"scale{v}", math.half(self.s[at + v * lanes, lanes])) for v in range(TILE // lanes)]

    # ---- int8 activations: exact integer sums in a group, one f32 chain over groups ----

    def _integer(self, index: Expr, rows: list[Expr], acc: Array) -> None:
        size = GROUP * TILE // (2 if self.format == "int4" else 1)
        base = let("base", wide(index) * (self.groups * size))
        xq = [let(f"q{r}", row * (self.groups * GROUP // 4)) for r, row in enumerate(rows)]
        xs = [let(f"d{r}", row * self.groups) for r, row in enumerate(rows)]
        sums = local("sums", "int32", len(rows) * TILE)
        halves = local("halves", "int16", len(rows) * TILE * 2)
        with loop("g", self.groups) as g:
            dot = self._dot4 if self.format == "int4" else self._dot8
            dot(let("wat", base + g * size), [q + g * (GROUP // 4) for q in xq], sums, halves)
            scales = self._scales(index, g, 8)
            for r in range(len(rows)):
                for v in range(2):
                    at = r * TILE + v * 8
                    value = T.Cast("float32x8", sums[at, 8])
                    if self.format == "int4":
                        value = T.fma(value, splat(self.a.xs[xs[r] + g], 8), splat(self.a.xm[xs[r] + g], 8))
                    else:
                        value = value * splat(self.a.xs[xs[r] + g], 8)
                    acc[at, 8] = T.fma(scales[v], value, acc[at, 8])

    def _dot4(self, at: Expr, xq: list[Expr], sums: Array, halves: Array) -> None:
        """Unsigned nibbles times signed bytes; sums of 8 products stay below 2^15 in 16 bits, a group in 16 of them."""
        for r in range(len(xq)):
            halves[r * 32, 32] = splat(T.int16(0), 32)
        for b in range(4):
            prefetch(self.w, at + b * 64 + AHEAD)
            for v in range(2):
                raw = let("raw", self.w[at + b * 64 + v * 32, 32])
                for high in range(2):
                    nibble = let("nibble", _high(raw) if high else _low(raw))
                    for r, q in enumerate(xq):
                        x = four(self.a.xq[q + b * 2 + high])
                        lane = r * 32 + v * 16
                        halves[lane, 16] = halves[lane, 16] + maddubs(nibble, x)
        for i in range(len(xq) * 2):
            sums[i * 8, 8] = maddwd(halves[i * 16, 16], splat(T.int16(1), 16))

    def _dot8(self, at: Expr, xq: list[Expr], sums: Array, halves: Array) -> None:
        """|w| times x with the sign of w; each pair of products fits 16 bits because codes stay within +-127."""
        for r in range(len(xq)):
            sums[r * 16, 16] = i32(0, 16)
        for b in range(8):
            prefetch(self.w, at + b * 64 + AHEAD)
            for v in range(2):
                w = let("w", self.w[at + b * 64 + v * 32, 32])
                size = let("size", sign(w, w))
                for r, q in enumerate(xq):
                    pair = maddubs(size, sign(four(self.a.xq[q + b]), w))
                    lane = r * 16 + v * 8
                    sums[lane, 8] = sums[lane, 8] + maddwd(pair, splat(T.int16(1), 16))


def _low(raw: Expr) -> Expr:
    return T.reinterpret("int8x32", T.bitwise_and(raw, splat(T.uint8(15), 32)))


def _high(raw: Expr) -> Expr:
    shifted = T.shift_right(T.reinterpret("uint16x16", raw), splat(T.uint16(4), 16))
    return _low(T.reinterpret("uint8x32", shifted))


def four(x: Expr) -> Expr:
    """Four int8 activations, an int32, in every lane."""
    return T.reinterpret("int8x32", splat(x, 8))


def maddubs(u: Expr, s: Expr) -> Expr:
    """Unsigned times signed bytes, neighbours summed (saturating) to int16x16."""
    return T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", u, s)


def maddwd(a: Expr, b: Expr) -> Expr:
    """int16 times int16, neighbours summed to int32x8."""
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", a, b)


def sign(x: Expr, w: Expr) -> Expr:
    """x with the sign of w, zero where w is zero."""
    return T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", x, w)
