"""Rotary embedding, cache append, and attention over pages.

A page holds `page` tokens of one sequence: keys [heads, dim, page], so that scores of neighbouring keys are SIMD lanes,
and values [heads, page, dim].
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

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
from qcn_compile.targets.tvm.kernels.softmax import KEYS, STACK, Softmax


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
                    gate: bool, stride_q: int, stride_g: int, many: bool) -> Function:
    """y[t] = softmax(scale q K^T) V over positions 0..pos(t), online over blocks of 32 keys, then * sigmoid(gate).

    Work item: (one token, or with `many` a few neighbours; kv head). Every block of keys serves all its queries before
    the next is touched. The row of y holds the unnormalised sum meanwhile.
    """
    f = Function(symbol, q="float32", **({"gate": "float32"} if gate else {}), y="float32", keys="float32",
                 values="float32", **BATCH)
    group = heads // kv_heads
    queries = max(1, min(4 if many else 1, STACK // group))
    with f as a:
        tokens = count(a, "T")
        with parallel("item", T.floordiv(tokens + queries - 1, queries) * kv_heads) as item:
            first = let("first", T.floordiv(item, kv_heads) * queries)
            softmax = Softmax(a, m, heads, kv_heads, dim, page, scale, T.floormod(item, kv_heads), queries, stride_q)
            end = let("end", T.min(first + queries, tokens))
            longest = local("longest", "int32", 1)
            longest[0] = T.int32(0)
            with loop("t", end, first) as t:
                _, pos = position(a, t)
                longest[0] = T.max(longest[0], pos)
                softmax.start(t, t - first)
            with loop("keys", T.floordiv(longest[0], KEYS) + 1) as keys, loop("t", end, first) as t:
                s, pos = position(a, t)
                with when(keys * KEYS <= pos):
                    at = let("page", page_of(a, s, keys * KEYS, page))
                    softmax.step(t, t - first, at, T.floormod(keys * KEYS, page), pos + 1 - keys * KEYS)
            with loop("t", end, first) as t:
                softmax.finish(t, t - first, (stride_g or heads * dim) if gate else 0)
    return f
