"""Rotary embedding, cache append, and attention over pages.

A page holds `page` tokens of one sequence: keys [heads, dim, page], so that scores of neighbouring keys are SIMD lanes,
and values [heads, page, dim].
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from qcn_compile.targets.tvm.kernels import math
from qcn_compile.targets.tvm.kernels.core import (
    Array,
    Arrays,
    Branch,
    Expr,
    Function,
    Machine,
    let,
    local,
    loop,
    parallel,
    splat,
    when,
    wide,
)
from qcn_compile.targets.tvm.kernels.loops import count, each, sweep
from qcn_compile.targets.tvm.kernels.norm import inverse_rms
from qcn_compile.targets.tvm.kernels.softmax import STACK, Merge, Softmax, part_blocks
from qcn_compile.targets.tvm.sizes import KEYS, PARTS


def rope_table(symbol: str, m: Machine, *, rows: str, width: int, scaling: float, threads: bool,
               factor: bool) -> Function:
    """cos and sin [rows, width] of positions x inv_freq, times scaling, and times inv_freq[width] with `factor`."""
    f = Function(symbol, positions="int32", inv_freq="float32", cos="float32", sin="float32", counts="int32")
    with f as a, each("t", count(a, rows), threads) as t, loop("i", width) as i:
        angle = let("angle", T.Cast("float32", a.positions[t]) * a.inv_freq[i])
        scale = let("scale", a.inv_freq[width] * T.float32(scaling)) if factor else T.float32(scaling)
        a.cos[t * width + i] = T.cos(angle) * scale
        a.sin[t * width + i] = T.sin(angle) * scale
    return f


BATCH = {"token_seq": "int32", "cu_seqlens": "int32", "context_lens": "int32", "block_table": "int32",
         "counts": "int32"}


def position(a: Arrays, t: Expr) -> tuple[Expr, Expr]:
    """Sequence of token t, and its position there."""
    s = let("s", a.token_seq[t])
    return s, let("pos", a.context_lens[s] + t - a.cu_seqlens[s])


def page_of(a: Arrays, s: Expr, pos: Expr, page: int) -> Expr:
    """Page that holds position `pos` of sequence s, 64 bit."""
    return wide(a.block_table[s * a.counts[3] + T.floordiv(pos, page)])


def rope_append(symbol: str, m: Machine, *, heads: int, kv_heads: int, dim: int, half: int, page: int, eps: float,
                q_norm: bool, k_norm: bool, stride_q: int, stride_k: int, stride_v: int) -> Function:
    """RMS norm and rotary embedding of q and k; q to y [T, heads, dim], k and v into their pages."""
    names = ["q", "k", "v", *(["q_w"] if q_norm else []), *(["k_w"] if k_norm else []), "cos", "sin", "y"]
    f = Function(symbol, **dict.fromkeys([*names, "keys", "values"], "float32"), **BATCH)
    with f as a, parallel("item", count(a, "T", heads + kv_heads)) as item:
        t, h = let("t", T.floordiv(item, heads + kv_heads)), let("h", T.floormod(item, heads + kv_heads))
        with Branch(h < heads) as b:
            with b.then:
                start = let("start", t * (stride_q or heads * dim) + h * dim)
                out = let("out", (t * heads + h) * dim)
                _turn(a, m, a.q, start, a.q_w if q_norm else None, t, dim, half, eps,
                      lambda i, n, v: a.y.__setitem__((out + i, n), v))
            with b.otherwise:
                _append(a, m, t, h - heads, kv_heads, dim, half, page, eps, k_norm, stride_k, stride_v)
    return f


def _append(a: Arrays, m: Machine, t: Expr, h: Expr, kv_heads: int, dim: int, half: int, page: int, eps: float,
            k_norm: bool, stride_k: int, stride_v: int) -> None:
    s, pos = position(a, t)
    slot = let("slot", T.floormod(pos, page))
    block = let("block", (page_of(a, s, pos, page) * kv_heads + h) * (dim * page))
    start = let("start", t * (stride_k or kv_heads * dim) + h * dim)
    _turn(a, m, a.k, start, a.k_w if k_norm else None, t, dim, half, eps,
          lambda i, n, v: a.keys.__setitem__(block + i * page + slot, v), lanes=1)
    source = let("source", t * (stride_v or kv_heads * dim) + h * dim)
    sweep(dim, m.lanes, lambda i, n: a.values.__setitem__((block + slot * dim + i, n), a.v[source + i, n]))


def _turn(a: Arrays, m: Machine, x: Array, start: Expr, w: Array | None, t: Expr, dim: int, half: int, eps: float,
          put: Callable[[Expr, int, Expr], None], lanes: int = 0) -> None:
    """put(i, lanes, value) for the normed, rotated head x[start : start+dim]; 2*half dims turn in pairs (i, i+half)."""
    scale = inverse_rms(x, start, dim, eps, m) if w is not None else None

    def normed(i: Expr, n: int) -> Expr:
        return x[start + i, n] if w is None else x[start + i, n] * splat(scale, n) * w[i, n]

    def pair(i: Expr, n: int) -> None:
        first, second = let("first", normed(i, n)), let("second", normed(i + half, n))
        c, s = let("c", a.cos[t * half + i, n]), let("s", a.sin[t * half + i, n])
        put(i, n, first * c - second * s)
        put(i + half, n, second * c + first * s)

    sweep(half, lanes or m.lanes, pair)
    if dim > 2 * half:
        sweep(dim - 2 * half, lanes or m.lanes, lambda i, n: put(i + 2 * half, n, normed(i + 2 * half, n)))


def attention_parts(symbol: str, m: Machine, *, heads: int, kv_heads: int, dim: int, page: int, scale: float,
                    stride_q: int) -> Function:
    """Every part of every token's context on its own: out [T, kv_heads, PARTS, group, dim], its maximum and sum in
    stats [T, kv_heads, PARTS, group, 2]. Work item: (token, kv head, part)."""
    f = Function(symbol, q="float32", out="float32", stats="float32", keys="float32", values="float32", **BATCH)
    group = heads // kv_heads
    with f as a, parallel("item", count(a, "T", kv_heads * PARTS)) as item:
        t, part = let("t", T.floordiv(item, kv_heads * PARTS)), let("part", T.floormod(item, PARTS))
        s, pos = position(a, t)
        size = let("size", part_blocks(pos))
        with when(part * size * KEYS <= pos):
            kv_head = T.floormod(T.floordiv(item, PARTS), kv_heads)
            softmax = Softmax(a, m, heads, kv_heads, dim, page, scale, kv_head, 1, stride_q, a.out)
            row = let("row", item * (group * dim))
            softmax.start(T.int32(0), row)
            end = let("end", T.min((part + 1) * size, T.floordiv(pos, KEYS) + 1))
            with loop("keys", end, part * size) as keys:
                _keys(a, softmax, s, pos, t, T.int32(0), row, keys, page)
            with loop("r", group) as r:
                a.stats[(item * group + r) * 2] = softmax.most[r]
                a.stats[(item * group + r) * 2 + 1] = softmax.norm(T.int32(0), r)
    return f


def _keys(a: Arrays, softmax: Softmax, s: Expr, pos: Expr, t: Expr, i: Expr, row: Expr, keys: Expr, page: int) -> None:
    """Block `keys` of sequence s for query i, token t at position pos."""
    where = let("page", page_of(a, s, keys * KEYS, page))
    softmax.step(t, i, row, where, T.floormod(keys * KEYS, page), pos + 1 - keys * KEYS)


def attention_merge(symbol: str, m: Machine, *, heads: int, kv_heads: int, dim: int, gate: bool,
                    stride_g: int) -> Function:
    """y = the parts of `attention_parts` joined in order, / l, * sigmoid(gate)."""
    f = Function(symbol, parts="float32", stats="float32", **({"gate": "float32"} if gate else {}), y="float32",
                 token_seq="int32", cu_seqlens="int32", context_lens="int32", counts="int32")
    group = heads // kv_heads
    with f as a, parallel("item", count(a, "T", heads)) as item:
        t, head = let("t", T.floordiv(item, heads)), let("head", T.floormod(item, heads))
        _, pos = position(a, t)
        first = let("first", ((t * kv_heads + T.floordiv(head, group)) * PARTS) * group + T.floormod(head, group))
        state = local("state", "float32", 2)
        state[0], state[1] = a.stats[first * 2], a.stats[first * 2 + 1]
        sweep(dim, m.lanes, lambda d, n: a.y.__setitem__((item * dim + d, n), a.parts[first * dim + d, n]))
        with loop("part", T.floordiv(T.floordiv(pos, KEYS), part_blocks(pos))) as before:
            part = let("part", first + (before + 1) * group)
            merge = Merge(state[0], state[1], a.stats[part * 2], a.stats[part * 2 + 1])
            sweep(dim, m.lanes, lambda d, n: a.y.__setitem__(
                (item * dim + d, n), merge.of(a.y[item * dim + d, n], a.parts[part * dim + d, n])))
            state[0], state[1] = merge.most, merge.norm
        _normalise(a, m, item * dim, dim, state[1], t * (stride_g or heads * dim) + head * dim if gate else None)
    return f


def _normalise(a: Arrays, m: Machine, row: Expr, dim: int, norm: Expr, gate: Expr | None) -> None:
    """y[row:] = y / norm * sigmoid(gate[gate:])."""
    inverse = let("inverse", T.float32(1.0) / norm)

    def body(d: Expr, n: int) -> None:
        value = a.y[row + d, n] * splat(inverse, n)
        a.y[row + d, n] = value if gate is None else value * math.sigmoid(a.gate[gate + d, n])

    sweep(dim, m.lanes, body)


def paged_attention(symbol: str, m: Machine, *, heads: int, kv_heads: int, dim: int, page: int, scale: float,
                    gate: bool, stride_q: int, stride_g: int) -> Function:
    """y[t] = softmax(scale q K^T) V over positions 0..pos(t), then * sigmoid(gate), for many tokens.

    Work item: (a few neighbouring tokens, kv head). A block of keys serves all its queries before the next is touched.
    Rows of y hold the part in progress; finished parts are joined in rows of `total`.
    """
    f = Function(symbol, q="float32", **({"gate": "float32"} if gate else {}), y="float32", total="float32",
                 keys="float32", values="float32", **BATCH)
    group = heads // kv_heads
    queries = max(1, min(4, STACK // group))
    with f as a:
        tokens = let("tokens", count(a, "T"))
        with parallel("item", T.floordiv(tokens + queries - 1, queries) * kv_heads) as item:
            first = let("first", T.floordiv(item, kv_heads) * queries)
            end = let("end", T.min(first + queries, tokens))
            softmax = Softmax(a, m, heads, kv_heads, dim, page, scale, T.floormod(item, kv_heads), queries, stride_q,
                              a.y)
            parts = Parts(softmax, queries)
            longest = local("longest", "int32", 1)
            longest[0] = T.int32(0)
            with loop("t", end, first) as t:
                _, pos = position(a, t)
                longest[0] = T.max(longest[0], pos)
                softmax.start(t - first, parts.row(t))
            with loop("keys", T.floordiv(longest[0], KEYS) + 1) as keys, loop("t", end, first) as t:
                s, pos = position(a, t)
                with when(keys * KEYS <= pos):
                    size = let("size", part_blocks(pos))
                    with when(T.And(keys > 0, T.floormod(keys, size) == 0)):
                        parts.retire(t, t - first, keys == size)
                    _keys(a, softmax, s, pos, t, t - first, let("row", parts.row(t)), keys, page)
            with loop("t", end, first) as t, loop("r", group) as r:
                _, pos = position(a, t)
                norm = parts.join(t, t - first, r, T.floordiv(pos, KEYS) >= part_blocks(pos))
                _normalise(a, m, parts.row(t) + r * dim, dim, norm,
                           t * (stride_g or heads * dim) + (softmax.kv_head * group + r) * dim if gate else None)
    return f


class Parts:
    """Finished parts of the contexts of an item's queries, joined in rows of `total`."""

    def __init__(self, softmax: Softmax, queries: int) -> None:
        self.softmax, self.group = softmax, softmax.group
        self.most = local("total_most", "float32", queries * self.group)
        self.norm = local("total_norm", "float32", queries * self.group)

    def row(self, t: Expr) -> Expr:
        """Where this group's columns of y[t] and total[t] start."""
        return (t * self.softmax.kv_heads + self.softmax.kv_head) * (self.group * self.softmax.dim)

    def retire(self, t: Expr, i: Expr, first: Expr) -> None:
        """Join the part of query i in progress, the first or a later one, to the total, and begin another."""
        softmax, dim = self.softmax, self.softmax.dim
        with loop("r", self.group) as r:
            state, row = i * self.group + r, let("row", self.row(t) + r * dim)
            part_most, part_norm = softmax.most[state], let("part_norm", softmax.norm(i, r))
            merge = Merge(self.most[state], self.norm[state], part_most, part_norm)

            def body(d: Expr, n: int) -> None:
                part, total = softmax.a.y[row + d, n], softmax.a.total[row + d, n]
                softmax.a.total[row + d, n] = T.Select(splat(first, n), part, merge.of(total, part))

            sweep(dim, softmax.m.lanes, body)
            self.most[state] = T.Select(first, part_most, merge.most)
            self.norm[state] = T.Select(first, part_norm, merge.norm)
        softmax.start(i, let("row", self.row(t)))

    def join(self, t: Expr, i: Expr, r: Expr, several: Expr) -> Expr:
        """Join the last part of head r to the total, in y, when there are several; returns the sum l."""
        softmax, state, row = self.softmax, i * self.group + r, let("row", self.row(t) + r * self.softmax.dim)
        norm = local("all", "float32", 1)
        norm[0] = softmax.norm(i, r)
        with when(several):
            merge = Merge(self.most[state], self.norm[state], softmax.most[state], norm[0])
            sweep(softmax.dim, softmax.m.lanes, lambda d, n: softmax.a.y.__setitem__(
                (row + d, n), merge.of(softmax.a.total[row + d, n], softmax.a.y[row + d, n])))
            norm[0] = merge.norm
        return norm[0]
