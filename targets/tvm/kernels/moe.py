"""Mixture of experts: route, sort (token, slot) pairs by expert, gate/up, down, combine.

Scratch `plan`, int32: active | expert[E] | start[E+1] | cursor[E] | order[pairs]. `expert` and `start` list the experts
that have work; `order` holds pair numbers token*k + slot, expert after expert. One path serves one token and many.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from qcn_compile.targets.tvm.kernels import math
from qcn_compile.targets.tvm.kernels.core import (
    Array,
    Arrays,
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
    when,
    wide,
)
from qcn_compile.targets.tvm.kernels.integer import make_tile
from qcn_compile.targets.tvm.kernels.loops import count, each, sweep
from qcn_compile.targets.tvm.kernels.tiles import (
    TILE,
    Tile,
    ask_for,
    block_sizes,
    for_blocks,
    for_lone,
    input_params,
    tile_range,
    weight_params,
)

PAD = 16  # a row of routing scratch is padded to whole vectors
REMOVED, LOWEST = -1.0, -2.0  # probabilities are >= 0


def moe_route(symbol: str, m: Machine, *, rows: str, experts: int, top_k: int, stride: int, normalize: bool,
              shared: bool, threads: bool) -> Function:
    """p = softmax(logits); ids, weights of the top_k, lower id first among equals. With `shared`, logit column
    `experts` is a gate: expert `experts` is appended with weight sigmoid(gate)."""
    f = Function(symbol, logits="float32", ids="int32", weights="float32", p="float32", counts="int32")
    slots, padded = top_k + int(shared), -(-experts // PAD) * PAD
    with f as a, each("t", count(a, rows), threads) as t:
        start, row = t * (stride or experts + int(shared)), t * padded
        _softmax(a.logits, start, a.p, row, experts, padded, m)
        chosen = local("chosen", "float32", top_k)
        for j in range(top_k):
            best = _argmax(a.p, row, padded, m)
            a.ids[t * slots + j] = best
            chosen[j] = a.p[row + best]
            a.p[row + best] = T.float32(REMOVED)
        norm = local("norm", "float32", 1)
        norm[0] = chosen[0]
        for j in range(1, top_k):
            norm[0] = norm[0] + chosen[j]
        for j in range(top_k):
            a.weights[t * slots + j] = chosen[j] / norm[0] if normalize else chosen[j]
        if shared:
            a.ids[t * slots + top_k] = T.int32(experts)
            a.weights[t * slots + top_k] = math.sigmoid(a.logits[start + experts])
    return f


def _softmax(x: Array, start: Expr, p: Array, row: Expr, width: int, padded: int, m: Machine) -> None:
    """p[row:] = softmax(x[start:start+width]), then LOWEST up to `padded`."""
    top, norm = local("top", "float32", m.lanes), local("sum", "float32", m.lanes)
    top[0, m.lanes], norm[0, m.lanes] = f32(-3.4e38, m.lanes), f32(0.0, m.lanes)
    sweep(width, m.lanes, lambda i, n: top.__setitem__((0, n), T.max(top[0, n], x[start + i, n])))
    most = let("most", math.greatest(top[0, m.lanes]))

    def exponential(i: Expr, n: int) -> None:
        e = let("exp", math.exp(x[start + i, n] - splat(most, n)))
        norm[0, n] = norm[0, n] + e
        p[row + i, n] = e

    sweep(width, m.lanes, exponential)
    scale = let("scale", math.total(norm[0, m.lanes]))
    sweep(width, m.lanes, lambda i, n: p.__setitem__((row + i, n), p[row + i, n] / splat(scale, n)))
    for i in range(width, padded):
        p[row + i] = T.float32(LOWEST)


def _argmax(p: Array, row: Expr, padded: int, m: Machine) -> Expr:
    """Index of the largest of p[row : row+padded], the lowest among equals; 0 when nothing compares (NaN)."""
    lanes = m.lanes
    best, where = local("best", "float32", lanes), local("where", "int32", lanes)
    best[0, lanes], where[0, lanes] = f32(LOWEST, lanes), i32(0, lanes)
    with loop("i", padded // lanes) as i:
        v = let("v", p[row + i * lanes, lanes])
        more = v > best[0, lanes]
        where[0, lanes] = T.Select(more, T.ramp(i * lanes, 1, lanes), where[0, lanes])
        best[0, lanes] = T.max(best[0, lanes], v)
    for lane in range(1, lanes):
        tie = T.And(best[lane] == best[0], where[lane] < where[0])
        where[0] = T.Select(T.Or(best[lane] > best[0], tie), where[lane], where[0])
        best[0] = T.max(best[lane], best[0])
    return let("best_id", where[0])


def local_experts(symbol: str, m: Machine, *, rows: str, slots: int, first: int, held: int, shared: int, group: int,
                  groups: int) -> Function:
    """The routing of one group of ranks: see the op's row. A pair of another group gets weight 0."""
    f = Function(symbol, ids="int32", weights="float32", here="int32", share="float32", counts="int32")
    last = held - 1 + int(shared >= 0)
    with f as a, loop("p", count(a, rows, slots)) as p:
        e = let("e", a.ids[p])
        routed = let("routed", T.And(e >= first, e < first + held))
        common = T.And(e == shared, T.floormod(T.floordiv(p, slots), groups) == group)
        a.here[p] = T.Select(routed, e - first, T.int32(last))
        a.share[p] = T.Select(T.Or(routed, common), a.weights[p], T.float32(0.0))
    return f


def moe_sort(symbol: str, m: Machine, *, rows: str, experts: int, slots: int) -> Function:
    """Counting sort of pairs by expert, stable. An id out of range counts as the nearest expert."""
    f = Function(symbol, ids="int32", plan="int32", counts="int32")
    expert, start, cursor, order = 1, 1 + experts, 2 + 2 * experts, 2 + 3 * experts
    with f as a:
        pairs = let("pairs", count(a, rows, slots))
        with loop("e", experts) as e:
            a.plan[cursor + e] = T.int32(0)
        with loop("p", pairs) as p:
            e = let("e", _clamped(a.ids[p], experts))
            a.plan[cursor + e] = a.plan[cursor + e] + 1
        state = local("state", "int32", 2)  # active experts, pairs placed
        state[0], state[1] = T.int32(0), T.int32(0)
        with loop("e", experts) as e:
            size = let("size", a.plan[cursor + e])
            a.plan[cursor + e] = state[1]
            with when(size > 0):
                a.plan[expert + state[0]] = e
                a.plan[start + state[0]] = state[1]
                state[0] = state[0] + 1
                state[1] = state[1] + size
        a.plan[0] = state[0]
        a.plan[start + state[0]] = state[1]
        with loop("p", pairs) as p:
            e = let("e", _clamped(a.ids[p], experts))
            at = let("at", a.plan[cursor + e])
            a.plan[order + at] = p
            a.plan[cursor + e] = at + 1
    return f


def _clamped(e: Expr, experts: int) -> Expr:
    return T.max(T.min(e, experts - 1), 0)


def moe_up(symbol: str, m: Machine, *, experts: int, slots: int, hidden: int, inner: int, fmt: str, act: str,
           stride: int, many: bool) -> Function:
    """h[pair] = silu(gate_e x[token]) * (up_e x[token]). Rows of h are padded to 8: [pairs, ceil8(inner)]."""
    f = Function(symbol, **input_params(act), **weight_params(fmt, act), plan="int32", h="float32")
    half, tiles = TILE // 2, -(-inner // (TILE // 2))
    sizes = block_sizes(m, act, many)
    with f as a:
        tile = make_tile(a, m, hidden, tiles, fmt, act)

        def store(acc: Array, r: int, pair: Expr, j: Expr) -> None:
            gate, up = acc[r * TILE, half], acc[r * TILE + half, half]
            a.h[wide(pair) * (tiles * half) + j * half, half] = math.silu(gate) * up

        _expert_tiles(a, experts, tiles, tile, sizes, stride, lambda pair: T.floordiv(pair, slots), store)
    return f


def moe_down(symbol: str, m: Machine, *, experts: int, hidden: int, inner: int, fmt: str, act: str,
             many: bool) -> Function:
    """o[pair] = down_e h[pair]. Rows of o are padded to 16: [pairs, ceil16(hidden)]."""
    f = Function(symbol, **input_params(act), **weight_params(fmt, act), plan="int32", o="float32")
    tiles = -(-hidden // TILE)
    sizes = block_sizes(m, act, many)
    with f as a:
        tile = make_tile(a, m, inner, tiles, fmt, act)

        def store(acc: Array, r: int, pair: Expr, j: Expr) -> None:
            a.o[wide(pair) * (tiles * TILE) + j * TILE, TILE] = acc[r * TILE, TILE]

        _expert_tiles(a, experts, tiles, tile, sizes, -(-inner // 8) * 8, lambda pair: pair, store)
    return f


def _expert_tiles(a: Arrays, experts: int, tiles: int, tile: Tile, sizes: tuple[int, ...], stride: int,
                  source: Callable[[Expr], Expr], store: Callable[[Array, int, Expr, Expr], None]) -> None:
    """For every (expert with work, tile) in parallel: blocks of its pairs, `source(pair)` the row of x of each."""
    plan, expert, start, order = a.plan, 1, 1 + experts, 2 + 3 * experts
    items = -(-tiles // tile.together)
    with parallel("item", plan[0] * items) as item:
        at = let("at", T.floordiv(item, items))
        place = let("place", T.floormod(item, items))
        begin, end, both = tile_range(tile, tiles, place)
        with when(T.And(place == items - 1, at + 1 < plan[0])):
            ask_for(a.w, tile.start(let("next", wide(plan[expert + at + 1]) * tiles)))
        first = let("first", plan[start + at])
        count = let("count", plan[start + at + 1] - first)
        base = let("base", wide(plan[expert + at]) * tiles)

        def body(skip: Expr, size: int, columns: list[Expr]) -> None:
            acc = local("acc", "float32", len(columns) * size * TILE)
            chosen = [let(f"pair{r}", plan[order + first + T.min(skip + r, count - 1)]) for r in range(size)]
            tile.multiply([base + j for j in columns], [source(pair) for pair in chosen], stride, acc)
            for r, pair in enumerate(chosen):
                with when(skip + r < count):
                    for i, j in enumerate(columns):
                        store(acc, i * size + r, pair, j)

        with loop("j", end, begin) as j:
            for_blocks(count, sizes, lambda skip, size: body(skip, size, [j]))
        for_lone(count, sizes, lambda last: body(last, 1, both))


def moe_combine(symbol: str, m: Machine, *, rows: str, slots: int, hidden: int, add: bool, stride_r: int,
                threads: bool) -> Function:
    """y[t] = (r[t] +) sum_j weights[t, j] o[t*slots + j], slots in order."""
    f = Function(symbol, o="float32", weights="float32", **({"r": "float32"} if add else {}), y="float32",
                 counts="int32")
    padded = -(-hidden // TILE) * TILE
    with f as a, each("t", count(a, rows), threads) as t:
        def body(i: Expr, n: int) -> None:
            value = local("value", "float32", n)
            value[0, n] = f32(0.0, n)
            for j in range(slots):
                weight = splat(a.weights[t * slots + j], n)
                value[0, n] = T.fma(weight, a.o[wide(t * slots + j) * padded + i, n], value[0, n])
            result = value[0, n] + a.r[t * (stride_r or hidden) + i, n] if add else value[0, n]
            a.y[t * hidden + i, n] = result

        sweep(hidden, m.lanes, body)
    return f
