"""Gated DeltaNet: convolution, gates and norms in one kernel; delta rule and gated norm in another.

The columns of a state [Dk, Dv] never meet. So they are stored in blocks of 32 columns, [Dv/32, Dk, 32]: 16 KiB that
stay in the first cache while all tokens of the sequence pass. The arithmetic of a token is the same for one token and
for a thousand: prefill and decode agree bit by bit. The chunked (WY) form would lose that for little: a token costs it
3 Dk Dv + chunk (Dk + Dv) multiplications, against 4 Dk Dv here, which already run at 80 % of the peak.
A state in bf16 is rounded after every token, in prefill too: so it depends on the tokens alone, not on how they came.

A sequence's states are read from slot `slots` and written to slot `into`: mostly the same. A step whose last tokens are
guesses writes to another slot, and what it read is still there when they prove wrong.
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
    lanes_of,
    let,
    local,
    loop,
    parallel,
    splat,
    when,
    wide,
)
from qcn_compile.targets.tvm.kernels.loops import reduce_row, sweep
from qcn_compile.targets.tvm.kernels.norm import inverse_rms
from qcn_compile.targets.tvm.sizes import state_columns

L2_EPS = 1e-6
SPANS = {"cu_seqlens": "int32", "context_lens": "int32", "slots": "int32", "counts": "int32", "into": "int32"}
STATES = {"f32": "float32", "bf16": "uint16"}


def span(a: Arrays, s: Expr) -> tuple[Expr, Expr, Expr, Expr, Expr]:
    """First token, end, slots read and written of sequence s, and whether its state starts from zeros."""
    return (let("begin", a.cu_seqlens[s]), let("end", a.cu_seqlens[s + 1]), let("slot", wide(a.slots[s])),
            let("target", wide(a.into[s])), let("fresh", a.context_lens[s] == 0))


def delta_conv(symbol: str, m: Machine, *, key_heads: int, value_heads: int, key_dim: int, value_dim: int, taps: int,
               stride_x: int, stride_a: int, stride_b: int) -> Function:
    """mixed = silu(conv(x)), q and k heads L2-normalised (q also / sqrt(Dk)); gates [T, 2, Hv] = exp(g), beta.

    Work item: (sequence, head); the last head of each sequence is the gates. conv state [slots, taps-1, C].
    """
    f = Function(symbol, x="float32", b="float32", a="float32", w="float32", decay="float32", dt_bias="float32",
                 conv="float32", mixed="float32", gates="float32", **SPANS)
    channels, heads = 2 * key_heads * key_dim + value_heads * value_dim, 2 * key_heads + value_heads
    with f as a, parallel("item", a.counts[1] * (heads + 1)) as item:
        s, h = let("s", T.floordiv(item, heads + 1)), let("h", T.floormod(item, heads + 1))
        begin, end, slot, target, fresh = span(a, s)
        size = (taps - 1) * channels
        conv = Conv(a, m, channels, taps, stride_x, (begin, end), (slot * size, target * size), fresh)
        with when(h < 2 * key_heads):
            first = let("first", h * key_dim)
            conv.run(first, key_dim)
            scale = let("qk", T.Select(h < key_heads, T.float32(key_dim ** -0.5), T.float32(1.0)))
            with loop("t", end, begin) as t:
                _l2_norm(a, m, t * channels + first, key_dim, scale)
        with when(T.And(h >= 2 * key_heads, h < heads)):
            conv.run(let("first", 2 * key_heads * key_dim + (h - 2 * key_heads) * value_dim), value_dim)
        with when(h == heads), loop("t", end, begin) as t:
            _gates(a, m, t, value_heads, stride_a or value_heads, stride_b or value_heads)
    return f


class Conv:
    """Depthwise causal convolution and silu of one sequence, the last taps-1 inputs kept in registers."""

    def __init__(self, a: Arrays, m: Machine, channels: int, taps: int, stride: int, tokens: tuple[Expr, Expr],
                 states: tuple[Expr, Expr], fresh: Expr) -> None:
        self.a, self.m, self.channels, self.taps, self.stride = a, m, channels, taps, stride or channels
        self.begin, self.end = tokens
        self.source, self.target, self.fresh = *states, fresh

    def run(self, first: Expr, width: int) -> None:
        """Channels first .. first+width, the state included."""
        sweep(width, self.m.lanes, lambda i, n: self._columns(first + i, n))

    def _columns(self, c: Expr, n: int) -> None:
        a, past = self.a, local("past", "float32", (self.taps - 1) * n)
        for i in range(self.taps - 1):
            past[i * n, n] = f32(0.0, n)
        with when(T.Not(self.fresh)):
            for i in range(self.taps - 1):
                past[i * n, n] = a.conv[self.source + i * self.channels + c, n]
        with loop("t", self.end, self.begin) as t:
            x = let("x", a.x[t * self.stride + c, n])
            y = f32(0.0, n)
            for i in range(self.taps - 1):
                y = T.fma(a.w[i * self.channels + c, n], past[i * n, n], y)
            y = T.fma(a.w[(self.taps - 1) * self.channels + c, n], x, y)
            a.mixed[t * self.channels + c, n] = math.silu(y)
            for i in range(self.taps - 2):
                past[i * n, n] = past[(i + 1) * n, n]
            past[(self.taps - 2) * n, n] = x
        for i in range(self.taps - 1):
            a.conv[self.target + i * self.channels + c, n] = past[i * n, n]


def _l2_norm(a: Arrays, m: Machine, start: Expr, width: int, factor: Expr) -> None:
    """mixed[start : start+width] *= factor / sqrt(sum of squares + 1e-6)."""
    def term(i: Expr, n: int) -> Expr:
        v = let("v", a.mixed[start + i, n])
        return v * v

    square = reduce_row("square", width, m.lanes, term)
    scale = let("scale", factor / T.sqrt(square + T.float32(L2_EPS)))
    sweep(width, m.lanes, lambda i, n: a.mixed.__setitem__((start + i, n), a.mixed[start + i, n] * splat(scale, n)))


def _gates(a: Arrays, m: Machine, t: Expr, heads: int, stride_a: int, stride_b: int) -> None:
    """gates[t, 0] = exp(decay * softplus(a + dt_bias)), gates[t, 1] = sigmoid(b)."""
    def body(i: Expr, n: int) -> None:
        g = a.decay[i, n] * math.softplus(a.a[t * stride_a + i, n] + a.dt_bias[i, n])
        a.gates[t * (2 * heads) + i, n] = math.exp(g)
        a.gates[t * (2 * heads) + heads + i, n] = math.sigmoid(a.b[t * stride_b + i, n])

    sweep(heads, m.lanes, body)


def delta_rule(symbol: str, m: Machine, *, key_heads: int, value_heads: int, key_dim: int, value_dim: int, eps: float,
               stride_z: int, state: str = "f32") -> Function:
    """S <- a S; u = beta (v - S^T k); S <- S + k u^T; o = S^T q; y = rms_norm(o, w) * silu(z).

    Work item: (sequence, value head). delta state [slots, Hv, Dv/c, Dk, c], c = state_columns(Dv); a = exp(g).
    `state`: its type, f32 or bf16; arithmetic is in f32.
    """
    f = Function(symbol, mixed="float32", gates="float32", z="float32", w="float32", delta=STATES[state], y="float32",
                 **SPANS)
    with f as a, parallel("item", a.counts[1] * value_heads) as item:
        s, h = let("s", T.floordiv(item, value_heads)), let("h", T.floormod(item, value_heads))
        begin, end, slot, into, fresh = span(a, s)
        rule = Rule(a, m, key_heads, value_heads, key_dim, value_dim, h)
        source = let("source", (slot * value_heads + h) * (key_dim * value_dim))
        target = let("state", (into * value_heads + h) * (key_dim * value_dim))
        with when(fresh):
            sweep(key_dim * value_dim, m.lanes, lambda i, n: rule.store(target + i, f32(0.0, n)))
        with loop("c", value_dim // rule.columns) as c, loop("t", end, begin) as t:
            first = T.And(t == begin, T.Not(fresh))
            block = c * (key_dim * rule.columns)
            rule.token(t, let("from", T.Select(first, source, target) + block), target + block, c * rule.columns)
        with loop("t", end, begin) as t:
            _gated_norm(a, m, let("row", (t * value_heads + h) * value_dim),
                        let("gate", t * (stride_z or value_heads * value_dim) + h * value_dim), value_dim, eps)
    return f


class Rule:
    """One token of the delta rule on one block of columns of a head's state.

    Sums over the rows of S run in a few chains, row i in chain i mod `chains`, so that additions need not wait.
    """

    def __init__(self, a: Arrays, m: Machine, key_heads: int, value_heads: int, key_dim: int, value_dim: int,
                 h: Expr) -> None:
        self.a, self.key_dim, self.value_dim, self.value_heads, self.h = a, key_dim, value_dim, value_heads, h
        head = let("key_head", T.floordiv(h, value_heads // key_heads))
        self.q, self.k = head * key_dim, (key_heads + head) * key_dim
        self.v = 2 * key_heads * key_dim + h * value_dim
        self.channels = 2 * key_heads * key_dim + value_heads * value_dim
        self.columns = state_columns(value_dim)
        self.lanes = m.lanes if self.columns % m.lanes == 0 else 1
        self.chains = max(1, 8 * self.lanes // self.columns)

    def load(self, at: Expr, n: int) -> Expr:
        """n elements of the state as f32."""
        found = self.a.delta[at, n]
        return found if self.a.delta.dtype == "float32" else math.widen(found)

    def store(self, at: Expr, value: Expr) -> None:
        """f32 elements into the state."""
        stored = value if self.a.delta.dtype == "float32" else math.narrow(value)
        self.a.delta[at, lanes_of(value)] = stored

    def token(self, t: Expr, source: Expr, target: Expr, c: Expr) -> None:
        """Token t on the block of `columns` columns from c on, whose state is read and written from there on."""
        a, n, lanes = self.a, self.columns, self.lanes
        row = let("row", t * self.channels)
        fade = splat(let("fade", a.gates[t * (2 * self.value_heads) + self.h]), lanes)
        beta = splat(let("beta", a.gates[t * (2 * self.value_heads) + self.value_heads + self.h]), lanes)
        u, o = local("u", "float32", self.chains * n), local("o", "float32", self.chains * n)
        for v in range(0, self.chains * n, lanes):
            u[v, lanes] = o[v, lanes] = f32(0.0, lanes)
        self._rows(lambda i, chain: self._read(row, source, i, chain, u))
        self._merge(u)
        for v in range(0, n, lanes):
            u[v, lanes] = (a.mixed[row + self.v + c + v, lanes] - u[v, lanes] * fade) * beta
        self._rows(lambda i, chain: self._write(row, source, target, i, chain, u, o, fade))
        self._merge(o)
        for v in range(0, n, lanes):
            a.y[(t * self.value_heads + self.h) * self.value_dim + c + v, lanes] = o[v, lanes]

    def _rows(self, step: Callable[[Expr, int], None]) -> None:
        """step(row of S, chain) for all rows."""
        with loop("i", self.key_dim // self.chains) as i:
            for chain in range(self.chains):
                step(i * self.chains + chain, chain)
        for chain in range(self.key_dim % self.chains):
            step(self.key_dim // self.chains * self.chains + chain, chain)

    def _read(self, row: Expr, state: Expr, i: Expr, chain: int, u: Array) -> None:
        """u += k[i] S[i]."""
        k = splat(let("ki", self.a.mixed[row + self.k + i]), self.lanes)
        for v in range(0, self.columns, self.lanes):
            at = chain * self.columns + v
            u[at, self.lanes] = T.fma(self.load(state + i * self.columns + v, self.lanes), k, u[at, self.lanes])

    def _write(self, row: Expr, source: Expr, target: Expr, i: Expr, chain: int, u: Array, o: Array,
               fade: Expr) -> None:
        """S[i] <- fade S[i] + k[i] u;  o += q[i] S[i]."""
        k = splat(let("ki", self.a.mixed[row + self.k + i]), self.lanes)
        q = splat(let("qi", self.a.mixed[row + self.q + i]), self.lanes)
        for v in range(0, self.columns, self.lanes):
            at = let("at", i * self.columns + v)
            new = let("new", T.fma(k, u[v, self.lanes], self.load(source + at, self.lanes) * fade))
            self.store(target + at, new)
            sum_ = chain * self.columns + v
            o[sum_, self.lanes] = T.fma(new, q, o[sum_, self.lanes])

    def _merge(self, sums: Array) -> None:
        """Add the chains up into the first."""
        for chain in range(1, self.chains):
            for v in range(0, self.columns, self.lanes):
                sums[v, self.lanes] = sums[v, self.lanes] + sums[chain * self.columns + v, self.lanes]


def _gated_norm(a: Arrays, m: Machine, row: Expr, gate: Expr, width: int, eps: float) -> None:
    """y[row:] = rms_norm(y[row:], w) * silu(z[gate:]) in place."""
    scale = inverse_rms(a.y, row, width, eps, m)

    def body(i: Expr, n: int) -> None:
        a.y[row + i, n] = a.y[row + i, n] * splat(scale, n) * a.w[i, n] * math.silu(a.z[gate + i, n])

    sweep(width, m.lanes, body)
