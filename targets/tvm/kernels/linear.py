"""Matrix products: parallel over tiles of 16 output rows; a tile stays in cache while blocks of tokens pass."""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from qcn_compile.targets.tvm.kernels import math
from qcn_compile.targets.tvm.kernels.core import (
    Array,
    Arrays,
    Branch,
    Expr,
    Function,
    Machine,
    f32,
    i32,
    let,
    local,
    loop,
    parallel,
    splat,
    vector,
    when,
)
from qcn_compile.targets.tvm.kernels.integer import make_tile
from qcn_compile.targets.tvm.kernels.loops import count, each, sweep
from qcn_compile.targets.tvm.kernels.tiles import (
    GROUP,
    TILE,
    block_sizes,
    for_blocks,
    for_lone,
    input_params,
    tile_range,
    weight_params,
)


def linear(symbol: str, m: Machine, *, n: int, k: int, fmt: str, act: str, rows: str, times: int, stride: int,
           many: bool, add: str, stride_r: int) -> Function:
    """y[t] = W x[t] (+ r[t] with add=rows, + r with add=bias). x [rows, k], W tiles of [n, k] -> y [rows, n]."""
    extra = {"r": "float32"} if add else {}
    f = Function(symbol, **input_params(act), **weight_params(fmt, act), **extra, y="float32", counts="int32")
    with f as a:
        tokens = let("tokens", count(a, rows, times))
        tiles, sizes = -(-n // TILE), block_sizes(m, act, many)
        tile = make_tile(a, m, k, tiles, fmt, act)
        with parallel("item", -(-tiles // tile.together)) as item:
            def body(first: Expr, size: int, columns: list[Expr]) -> None:
                acc = local("acc", "float32", len(columns) * size * TILE)
                chosen = [let("t", T.min(first + r, tokens - 1)) for r in range(size)]
                tile.multiply(columns, chosen, stride, acc)
                for r in range(size):
                    with when(first + r < tokens):
                        for i, j in enumerate(columns):
                            _store(a, acc, i * size + r, first + r, j, n, add, stride_r)

            begin, end, both = tile_range(tile, tiles, item)
            with loop("j", end, begin) as j:
                for_blocks(tokens, sizes, lambda first, size: body(first, size, [j]))
            for_lone(tokens, sizes, lambda last: body(last, 1, both))
    return f


def _store(a: Arrays, acc: Array, r: int, t: Expr, j: Expr, n: int, add: str, stride_r: int) -> None:
    """Row r of acc into y[t], columns of tile j; the last tile may be ragged."""
    def put(offset: Expr, lanes: int, at: Expr) -> None:
        value = acc[at, lanes]
        if add:
            value = value + a.r[(t * (stride_r or n) if add == "rows" else 0) + offset, lanes]
        a.y[t * n + offset, lanes] = value

    if n % TILE == 0:
        put(j * TILE, TILE, r * TILE)
        return
    with Branch(j < n // TILE) as b:
        with b.then:
            put(j * TILE, TILE, r * TILE)
        with b.otherwise:
            for i in range(n % TILE):
                put(n // TILE * TILE + i, 1, r * TILE + i)


def quantize(symbol: str, m: Machine, *, rows: str, times: int, width: int, stride: int, zero: int,
             threads: bool) -> Function:
    """x [rows, width] f32 -> int8 codes, scale = max|x|/127 and zero point term -zero * sum(codes), in groups of 32;
    the last group is filled up with zeros."""
    f = Function(symbol, x="float32", xq="int8", xs="float32", xz="int32", counts="int32")
    groups = -(-width // GROUP)
    with f as a, each("t", count(a, rows, times), threads) as t:
        start = let("start", t * (stride or width))

        def group(g: Expr, size: int) -> None:
            values = local("values", "float32", GROUP)
            if size < GROUP:
                values[0, GROUP] = f32(0.0, GROUP)
            sweep(size, m.lanes, lambda i, n: values.__setitem__((i, n), a.x[start + g * GROUP + i, n]))
            _quantize_group(a, m, values, t * groups + g, zero)

        if width // GROUP:
            with loop("g", width // GROUP) as g:
                group(g, GROUP)
        if width % GROUP:
            group(width // GROUP, width % GROUP)
    return f


def _quantize_group(a: Arrays, m: Machine, values: Array, g: Expr, zero: int) -> None:
    """One group of 32 values into xq, xs, xz at group index g."""
    lanes = m.lanes
    most, total = local("most", "float32", lanes), local("total", "int32", lanes)
    most[0, lanes], total[0, lanes] = f32(0.0, lanes), i32(0, lanes)
    for c in range(0, GROUP, lanes):
        most[0, lanes] = T.max(most[0, lanes], math.absolute(values[c, lanes]))
    top = let("top", math.greatest(most[0, lanes]))
    inverse = let("inverse", T.Select(top > T.float32(1e-30), T.float32(127.0) / top, T.float32(0.0)))
    for c in range(0, GROUP, lanes):
        code = let("code", T.Cast(vector("int32", lanes), T.nearbyint(values[c, lanes] * splat(inverse, lanes))))
        total[0, lanes] = total[0, lanes] + code
        a.xq[g * GROUP + c, lanes] = T.Cast(vector("int8", lanes), code)
    a.xs[g] = top / T.float32(127.0)
    a.xz[g] = math.total(total[0, lanes]) * T.int32(-zero)
