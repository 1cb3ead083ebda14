"""Online softmax attention of the query heads that share one kv head, a block of keys at a time (Milakov & Gimelshein,
"Online normalizer calculation for softmax", 2018).

For a block of scores s and its values V:  m' = max(m, max s);  f = e^(m - m');  p = e^(s - m');
l <- f l + sum p;  y <- f y + p V;  m <- m'.  In the end y / l.

A long context is cut into parts, so that several threads can share one token ("flash decoding"): at least 512 keys
each, at most 16 of them, by the position of the query alone. Parts are merged in order wherever they were computed, so
a token gets the same bits when it is decoded and when it is part of a prefill.
"""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from qcn_compile.targets.tvm.kernels import math
from qcn_compile.targets.tvm.kernels.core import (
    Array,
    Arrays,
    Expr,
    Machine,
    f32,
    lanes_of,
    let,
    local,
    loop,
    splat,
    wide,
)
from qcn_compile.targets.tvm.kernels.loops import sweep, unrolled
from qcn_compile.targets.tvm.sizes import KEYS, PART_BLOCKS, PARTS

MASKED = -1e30
SUMS = 4  # running sums are kept in this many lanes
STACK = 1008 // (4 * SUMS)  # running sums that fit one stack array


def part_blocks(pos: Expr) -> Expr:
    """Blocks of keys in a part, for the query at position pos."""
    return T.max(PART_BLOCKS, T.floordiv(T.floordiv(pos, KEYS) + PARTS, PARTS))


class Softmax:
    """Running state of `queries` tokens times `group` heads: maximum m, sum l on the stack, sum y in rows of `out`."""

    def __init__(self, a: Arrays, m: Machine, heads: int, kv_heads: int, dim: int, page: int, scale: float,
                 kv_head: Expr, queries: int, stride_q: int, out: Array) -> None:
        self.a, self.m, self.dim, self.page, self.scale, self.out = a, m, dim, page, scale, out
        self.group, self.kv_heads, self.stride_q = heads // kv_heads, kv_heads, stride_q or heads * dim
        self.kv_head = let("kv_head", kv_head)
        self.most = local("most", "float32", queries * self.group)
        self.sum = local("norm", "float32", queries * self.group * SUMS)
        self.block = min(self.group, max(1, 8 * m.lanes // KEYS))  # heads whose scores fill 8 vectors
        self.fade = local("fade", "float32", self.block)
        self.p = local("p", "float32", self.block * KEYS)

    def start(self, i: Expr, row: Expr) -> None:
        """No key seen yet by query i, whose sums are at out[row:]."""
        for r in range(self.group):
            self.most[i * self.group + r] = T.float32(MASKED)
            self.sum[(i * self.group + r) * SUMS, SUMS] = f32(0.0, SUMS)
        sweep(self.group * self.dim, self.m.lanes, lambda d, n: self.out.__setitem__((row + d, n), f32(0.0, n)))

    def norm(self, i: Expr, r: Expr) -> Expr:
        """The sum l of query i, head r of the group."""
        return math.total(self.sum[(i * self.group + r) * SUMS, SUMS])

    def step(self, t: Expr, i: Expr, row: Expr, page: Expr, slot: Expr, valid: Expr) -> None:
        """Query i is token t. 32 keys from `slot` of `page`; the first `valid` of them count."""
        at = let("at", (page * self.kv_heads + self.kv_head) * (self.dim * self.page))
        valid = let("valid", T.min(valid, KEYS))
        if self.group >= self.block:
            with loop("heads", self.group // self.block) as block:
                self._heads(t, i, row, block * self.block, self.block, at, slot, valid)
        if rest := self.group % self.block:
            self._heads(t, i, row, T.int32(self.group - rest), rest, at, slot, valid)

    def _heads(self, t: Expr, i: Expr, row: Expr, first: Expr, size: int, at: Expr, slot: Expr, valid: Expr) -> None:
        """One block of keys for heads first .. first+size of the group."""
        lanes, state = self.m.lanes, let("state", i * self.group + first)
        q = let("q_row", t * self.stride_q + (self.kv_head * self.group + first) * self.dim)
        for r, score in enumerate(self._scores(q, size, at + slot, valid)):
            top = score[0]
            for other in score[1:]:
                top = T.max(top, other)
            most = let("most", T.max(self.most[state + r], math.greatest(top)))
            self.fade[r] = self.most[state + r] - most
            self.most[state + r] = most
            for v, value in enumerate(score):
                self.p[r * KEYS + v * lanes, lanes] = math.exp(value - splat(most, lanes))
        self.fade[0, size] = math.exp(self.fade[0, size])
        for r in range(size):
            total = self.p[r * KEYS, lanes]
            for v in range(1, KEYS // lanes):
                total = total + self.p[r * KEYS + v * lanes, lanes]
            old = self.sum[(state + r) * SUMS, SUMS] * splat(self.fade[r], SUMS)
            self.sum[(state + r) * SUMS, SUMS] = old + math.fold(lambda a, b: a + b, let("total", total), SUMS)
        self._values(let("out", row + first * self.dim), size, at + slot * self.dim, valid)

    def _scores(self, q: Expr, size: int, at: Expr, valid: Expr) -> list[list[Expr]]:
        """scale q k of `size` heads, by vector of keys; MASKED beyond the valid ones."""
        lanes, vectors = self.m.lanes, KEYS // self.m.lanes
        acc = local("scores", "float32", size * KEYS)
        for i in range(size * vectors):
            acc[i * lanes, lanes] = f32(0.0, lanes)

        def step(d: Expr) -> None:
            keys = [let(f"k{v}", self.a.keys[at + d * self.page + v * lanes, lanes]) for v in range(vectors)]
            for r in range(size):
                x = splat(let("qd", self.a.q[q + r * self.dim + d]), lanes)
                for v, k in enumerate(keys):
                    i = (r * vectors + v) * lanes
                    acc[i, lanes] = T.fma(x, k, acc[i, lanes])

        unrolled(self.dim, 4, step)

        def masked(r: int, v: int) -> Expr:
            score = acc[(r * vectors + v) * lanes, lanes] * f32(self.scale, lanes)
            return let("score", T.Select(T.ramp(v * lanes, 1, lanes) < splat(valid, lanes), score, f32(MASKED, lanes)))

        return [[masked(r, v) for v in range(vectors)] for r in range(size)]

    def _values(self, out: Expr, size: int, at: Expr, valid: Expr) -> None:
        """y = y * fade + p V, a few columns of every head at a time."""
        def columns(d: Expr, n: int) -> None:
            acc = local("acc", "float32", size * n)
            for r in range(size):
                acc[r * n, n] = self.out[out + r * self.dim + d, n] * splat(self.fade[r], n)
            with loop("key", valid) as key:
                v = let("v", self.a.values[at + wide(key) * self.dim + d, n])
                for r in range(size):
                    acc[r * n, n] = T.fma(splat(self.p[r * KEYS + key], n), v, acc[r * n, n])
            for r in range(size):
                self.out[out + r * self.dim + d, n] = acc[r * n, n]

        width = max(1, 8 // size) * self.m.lanes  # 8 vectors of sums
        sweep(self.dim, width if self.dim % width == 0 else self.m.lanes, columns)


class Merge:
    """Parts of one head joined: total maximum, total sum, and the factors of the old total and of the next part."""

    def __init__(self, most: Expr, norm: Expr, part_most: Expr, part_norm: Expr) -> None:
        part_most = let("part_most", part_most)
        self.most = let("most", T.max(most, part_most))
        self.old, self.new = let("old", math.exp(most - self.most)), let("new", math.exp(part_most - self.most))
        self.norm = let("norm", T.fma(norm, self.old, part_norm * self.new))

    def of(self, total: Expr, part: Expr) -> Expr:
        """Elements of the joined sum."""
        n = lanes_of(total)
        return T.fma(total, splat(self.old, n), part * splat(self.new, n))
