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
    f32,
    let,
    local,
    loop,
    parallel,
    splat,
    wide,
)
from qcn_compile.targets.tvm.kernels.loops import count, each, sweep
from qcn_compile.targets.tvm.kernels.norm import inverse_rms

KEYS = 16  # keys scored together
MASKED = -1e30


def rope_table(symbol: str, m: Machine, *, rows: str, width: int, scaling: float, threads: bool) -> Function:
    """cos and sin of positions x inv_freq, times scaling. -> [rows, width] each."""
    f = Function(symbol, positions="int32", inv_freq="float32", cos="float32", sin="float32", counts="int32")
    with f as a, each("t", count(a, rows), threads) as t, loop("i", width) as i:
        angle = let("angle", T.Cast("float32", a.positions[t]) * a.inv_freq[i])
        a.cos[t * width + i] = T.cos(angle) * T.float32(scaling)
        a.sin[t * width + i] = T.sin(angle) * T.float32(scaling)
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


def paged_attention(symbol: str, m: Machine, *, heads: int, kv_heads: int, dim: int, page: int, scale: float,
                    gate: bool, stride_q: int, stride_g: int) -> Function:
    """y[t] = softmax(scale q K^T) V over positions 0..pos(t), online over blocks of 16 keys, then * sigmoid(gate).

    Work item: (token, kv head); its query heads go in blocks that share every load of K and V. The row of y holds the
    unnormalised sum meanwhile.
    """
    f = Function(symbol, q="float32", **({"gate": "float32"} if gate else {}), y="float32", keys="float32",
                 values="float32", **BATCH)
    group, most = heads // kv_heads, 4 if m.lanes <= 8 else 8
    with f as a, parallel("item", count(a, "T", kv_heads)) as item:
        t, h = let("t", T.floordiv(item, kv_heads)), let("h", T.floormod(item, kv_heads))
        s, pos = position(a, t)
        for first in range(0, group, most):
            size = min(most, group - first)
            head = let("head", h * group + first)
            block = HeadBlock(a, m, size, dim, page, scale, let("q", t * (stride_q or heads * dim) + head * dim),
                              let("out", (t * heads + head) * dim))
            block.start()
            with loop("keys", T.floordiv(pos + KEYS, KEYS)) as kb:
                at = let("page", (page_of(a, s, kb * KEYS, page) * kv_heads + h) * (dim * page))
                block.step(at, T.floormod(kb * KEYS, page), pos + 1 - kb * KEYS)
            block.finish(let("g", t * (stride_g or heads * dim) + head * dim) if gate else None)
    return f


class HeadBlock:
    """Online softmax of `size` query heads over one kv head: running maximum, running sum, output sum in y."""

    def __init__(self, a: Arrays, m: Machine, size: int, dim: int, page: int, scale: float, q: Expr, out: Expr) -> None:
        self.a, self.m, self.size, self.dim, self.page, self.scale, self.q, self.out = (a, m, size, dim, page, scale,
                                                                                       q, out)
        self.most, self.sum = local("most", "float32", size), local("norm", "float32", size)
        self.fade = local("fade", "float32", size)

    def start(self) -> None:
        for r in range(self.size):
            self.most[r], self.sum[r] = T.float32(MASKED), T.float32(0.0)
        sweep(self.size * self.dim, self.m.lanes, lambda i, n: self.a.y.__setitem__((self.out + i, n), f32(0.0, n)))

    def step(self, block: Expr, slot: Expr, valid: Expr) -> None:
        """16 keys from `slot` of the page that starts at `block`; the first `valid` of them count."""
        p = local("p", "float32", self.size * KEYS)
        self._scores(block + slot, p)
        for r in range(self.size):
            self._weights(r, valid, p)
        self._values(block + slot * self.dim, T.min(valid, KEYS), p)

    def _scores(self, at: Expr, p: Array) -> None:
        lanes = self.m.lanes
        p[0, self.size * KEYS] = f32(0.0, self.size * KEYS)
        with loop("d", self.dim) as d:
            keys = [let(f"k{v}", self.a.keys[at + d * self.page + v * lanes, lanes]) for v in range(KEYS // lanes)]
            for r in range(self.size):
                q = splat(let("qd", self.a.q[self.q + r * self.dim + d]), lanes)
                for v, k in enumerate(keys):
                    i = r * KEYS + v * lanes
                    p[i, lanes] = T.fma(q, k, p[i, lanes])

    def _weights(self, r: int, valid: Expr, p: Array) -> None:
        lanes, top = self.m.lanes, local("top", "float32", self.m.lanes)
        for v in range(KEYS // lanes):
            i = r * KEYS + v * lanes
            kept = T.ramp(v * lanes, 1, lanes) < splat(valid, lanes)
            p[i, lanes] = T.Select(kept, p[i, lanes] * f32(self.scale, lanes), f32(MASKED, lanes))
            top[0, lanes] = p[i, lanes] if v == 0 else T.max(top[0, lanes], p[i, lanes])
        most = let("most", T.max(self.most[r], math.greatest(top, lanes)))
        self.fade[r] = math.exp(self.most[r] - most)
        self.most[r] = most
        for v in range(KEYS // lanes):
            i = r * KEYS + v * lanes
            p[i, lanes] = math.exp(p[i, lanes] - splat(most, lanes))
            top[0, lanes] = p[i, lanes] if v == 0 else top[0, lanes] + p[i, lanes]
        self.sum[r] = self.sum[r] * self.fade[r] + math.total(top, lanes)

    def _values(self, at: Expr, valid: Expr, p: Array) -> None:
        """y = y * fade + p V, 2 vectors of every head at a time."""
        def columns(d: Expr, n: int) -> None:
            acc = local("acc", "float32", self.size * n)
            for r in range(self.size):
                acc[r * n, n] = self.a.y[self.out + r * self.dim + d, n] * splat(self.fade[r], n)
            with loop("key", valid) as key:
                v = let("v", self.a.values[at + key * self.dim + d, n])
                for r in range(self.size):
                    acc[r * n, n] = T.fma(splat(p[r * KEYS + key], n), v, acc[r * n, n])
            for r in range(self.size):
                self.a.y[self.out + r * self.dim + d, n] = acc[r * n, n]

        pair = 2 * self.m.lanes
        sweep(self.dim, pair if self.dim % pair == 0 and self.size <= 4 else self.m.lanes, columns)

    def finish(self, gate: Expr | None) -> None:
        for r in range(self.size):
            inverse = let("inverse", T.float32(1.0) / self.sum[r])

            def body(i: Expr, n: int, r: int = r, inverse: Expr = inverse) -> None:
                at = self.out + r * self.dim + i
                value = self.a.y[at, n] * splat(inverse, n)
                if gate is not None:
                    value = value * math.sigmoid(self.a.gate[gate + r * self.dim + i, n])
                self.a.y[at, n] = value

            sweep(self.dim, self.m.lanes, body)
