"""Kernels of plans of one token: matrix-vector products and experts, as tiles whose layout Triton is led to.

A tile is [L, RG, RW, C]: L lanes along a row of weights with C = 8 elements each, RG groups of rows side by side
(L * RG threads), RW rows one after the other in registers. Every load ends in C, so no layout is ever converted, and x
is read once for RW rows. Weights are asked for before the kernel in front has ended where they are known.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import all_asked, begin, rounded, silu, to_f32


@triton.jit
def columns(c0, L: tl.constexpr):
    """Column numbers [L, 1, 1, C] of a tile."""
    return c0 + tl.arange(0, L)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :]


@triton.jit
def row_tile(w, row, rows, c0, K: tl.constexpr, L: tl.constexpr, FULL: tl.constexpr, EVICT: tl.constexpr):
    """w[row, c0 : c0 + L C] as stored, [L, RG, RW, C]; rows [1, RG, RW, 1]. Outside: zeros."""
    k = columns(c0, L)
    if FULL:
        return tl.load(w + row * K + k, eviction_policy=EVICT)
    else:
        return tl.load(w + row * K + k, mask=(row < rows) & (k < K), other=0.0, eviction_policy=EVICT)


@triton.jit
def vector_tile(x, c0, K: tl.constexpr, L: tl.constexpr, RG: tl.constexpr):
    """x[c0 : c0 + L C] in f32, [L, RG, 1, C]."""
    k = columns(c0, L) + tl.arange(0, RG)[None, :, None, None] * 0
    if K % (L * 8) == 0:
        return tl.load(x + k).to(tl.float32)
    else:
        return tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def block_scale(s, row, rows, c0, K: tl.constexpr, L: tl.constexpr, FULL: tl.constexpr):
    """Scales [L, RG, 1, 1] of a tile; the first row of each group, `row` [1, RG, 1, 1], stands for all of it: RW
    divides 128."""
    k = c0 + tl.arange(0, L)[:, None, None, None] * 8
    at = s + (row // 128) * ((K + 127) // 128) + k // 128
    if FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=(row < rows) & (k < K), other=0.0)


@triton.jit
def tile_products(row0, x, norm_w, w, s, r, normed, y, N: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
                  RG: tl.constexpr, RW: tl.constexpr, HOLD: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
                  NORM: tl.constexpr, KEEP: tl.constexpr, EPS: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr):
    """RG * RW rows of one product. The first HOLD column tiles are on their way before the wait. NORM: x goes through
    an RMS norm, its weight on the way in, its scale at the end; with KEEP the program of row 0 stores the normed x."""
    steps: tl.constexpr = (K + L * 8 - 1) // (L * 8)
    full: tl.constexpr = K % (L * 8) == 0 and N % (RG * RW) == 0
    group = row0 + tl.arange(0, RG)[None, :, None, None] * RW
    n = group + tl.arange(0, RW)[None, None, :, None]
    held, norms, scales = (), (), ()
    for i in tl.static_range(HOLD):
        held = held + (row_tile(w, n, N, i * (L * 8), K, L, full, ""),)
        if SCALED:
            scales = scales + (block_scale(s, group, N, i * (L * 8), K, L, full),)
    if NORM:
        for i in tl.static_range(steps):
            norms = norms + (vector_tile(norm_w, i * (L * 8), K, L, RG),)
    begin(PDL)
    acc = tl.zeros((L, RG, RW, 1), tl.float32)
    squares = tl.zeros((L, RG, 1, 1), tl.float32)
    for i in tl.static_range(steps):
        v = vector_tile(x, i * (L * 8), K, L, RG)
        if NORM:
            squares += tl.sum(v * v, 3, keep_dims=True)
            v *= norms[i]
        tile = held[i] if i < HOLD else row_tile(w, n, N, i * (L * 8), K, L, full, "")
        part = tl.sum(to_f32(tile) * v, 3, keep_dims=True)
        if SCALED:
            part *= scales[i] if i < HOLD else block_scale(s, group, N, i * (L * 8), K, L, full)
        acc += part
    out = tl.sum(acc, 0, keep_dims=True)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0, keep_dims=True) / K + EPS)
        out *= scale
        if KEEP:
            for i in tl.static_range(steps):
                k = columns(i * (L * 8), L)
                v = vector_tile(x, i * (L * 8), K, L, RG) * norms[i] * scale
                tl.store(normed + k + group * 0, v.to(tl.bfloat16), mask=(k < K) & (group == 0))
    if BIAS:
        out += tl.load(r + n, mask=n < N, other=0.0).to(tl.float32)
    if ADD:
        out = rounded(out) + tl.load(r + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(tl.bfloat16), mask=n < N)


@triton.jit
def product(x, norm_w, w, s, r, normed, y, N: tl.constexpr, K: tl.constexpr, L: tl.constexpr, RG: tl.constexpr,
            RW: tl.constexpr, HOLD: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
            KEEP: tl.constexpr, EPS: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr):
    """y = w x (+ r) of one token, x as it is or normed. Grid (N / (RG RW))."""
    tile_products(tl.program_id(0) * (RG * RW), x, norm_w, w, s, r, normed, y, N, K, L, RG, RW, HOLD, ADD, BIAS, NORM,
                  KEEP, EPS, SCALED, PDL)


@triton.jit
def product_pair(x, norm_w, w, s, w2, y, y2, N: tl.constexpr, N2: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
                 RG: tl.constexpr, RW: tl.constexpr, HOLD: tl.constexpr, EPS: tl.constexpr, SCALED: tl.constexpr,
                 PDL: tl.constexpr):
    """Two products of one normed token, the second with bf16 weights. Grid (N2 / RG + N / (RG RW))."""
    p = tl.program_id(0)
    small: tl.constexpr = (N2 + RG - 1) // RG
    if p < small:
        tile_products(p * RG, x, norm_w, w2, None, None, None, y2, N2, K, L, RG, 1, HOLD, False, False, True, False,
                      EPS, False, PDL)
    else:
        tile_products((p - small) * (RG * RW), x, norm_w, w, s, None, None, y, N, K, L, RG, RW, HOLD, False, False,
                      True, False, EPS, SCALED, PDL)


@triton.jit
def pair_sum(a, b, c, d):
    return a + c, b + d


@triton.jit
def up_rows(x, ids, w, s, h, slot, EXPERT: tl.constexpr, H: tl.constexpr, F: tl.constexpr, L: tl.constexpr,
            RG: tl.constexpr, RW: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr):
    """RG * RW rows of one slot, whose expert is EXPERT, or ids[slot] where that is -1. All weights are asked for before
    the first is used; those of a known EXPERT before the kernel in front, which chooses the others, has ended."""
    steps: tl.constexpr = (H + L * 8 - 1) // (L * 8)
    full: tl.constexpr = H % (L * 8) == 0 and F % (RG * RW) == 0
    blocks: tl.constexpr = ((2 * F + 127) // 128) * ((H + 127) // 128)
    group = tl.program_id(0) * (RG * RW) + tl.arange(0, RG)[None, :, None, None] * RW
    f = group + tl.arange(0, RW)[None, None, :, None]
    if EXPERT < 0:
        begin(PDL)
        expert = tl.load(ids + slot).to(tl.int64)
    else:
        expert = tl.full((), EXPERT, tl.int64)
    gates, ups, gate_scales, up_scales = (), (), (), ()
    for k in tl.static_range(0, steps * L * 8, L * 8):
        if SCALED:
            gate_scales = gate_scales + (block_scale(s + expert * blocks, group, 2 * F, k, H, L, full),)
            up_scales = up_scales + (block_scale(s + expert * blocks, group + F, 2 * F, k, H, L, full),)
        gates = gates + (row_tile(w + expert * (2 * F * H), f, F, k, H, L, full, "evict_first"),)
        ups = ups + (row_tile(w + expert * (2 * F * H) + F * H, f, F, k, H, L, full, "evict_first"),)
    if EXPERT < 0:
        all_asked(PDL)
    else:
        begin(PDL)
    a = tl.zeros((L, RG, RW, 1), tl.float32)
    b = tl.zeros((L, RG, RW, 1), tl.float32)
    for k in tl.static_range(steps):
        v = vector_tile(x, k * (L * 8), H, L, RG)
        gate = tl.sum(to_f32(gates[k]) * v, 3, keep_dims=True)
        up = tl.sum(to_f32(ups[k]) * v, 3, keep_dims=True)
        a += gate * gate_scales[k] if SCALED else gate
        b += up * up_scales[k] if SCALED else up
    a, b = tl.reduce((a, b), 0, pair_sum, keep_dims=True)
    tl.store(h + slot * F + f, (silu(a) * b).to(tl.bfloat16), mask=f < F)


@triton.jit
def up_one(x, ids, w, s, h, SLOTS: tl.constexpr, SHARED: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
           L: tl.constexpr, RG: tl.constexpr, RW: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr):
    """h[slot] = silu(gate x) * up x of one token. Grid (F / (RG RW), slots); w [E, 2F, H], gate above up. SHARED: the
    expert of the last slot where it is always the same, else -1; its programs come first."""
    if SHARED >= 0:
        if tl.program_id(1) == 0:
            up_rows(x, ids, w, s, h, SLOTS - 1, SHARED, H, F, L, RG, RW, SCALED, PDL)
        else:
            up_rows(x, ids, w, s, h, tl.program_id(1) - 1, -1, H, F, L, RG, RW, SCALED, PDL)
    else:
        up_rows(x, ids, w, s, h, tl.program_id(1), -1, H, F, L, RG, RW, SCALED, PDL)


@triton.jit
def down_one(h, ids, weights, w, s, r, y, SLOTS: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
             L: tl.constexpr, RG: tl.constexpr, RW: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
             PDL: tl.constexpr):
    """y = (r +) sum over slots of weight * down h[slot] of one token. Grid (H / RW): RW rows, RG slots side by side;
    w [E, H, F]. All rows are asked for before the kernel in front (up_one) has ended: the experts are older."""
    steps: tl.constexpr = (F + L * 8 - 1) // (L * 8)
    passes: tl.constexpr = (SLOTS + RG - 1) // RG
    blocks: tl.constexpr = ((H + 127) // 128) * ((F + 127) // 128)
    row0 = tl.program_id(0) * RW
    n = row0 + tl.arange(0, RW)[None, None, :, None]
    tiles, factors = (), ()
    for i in tl.static_range(passes):
        slot = i * RG + tl.arange(0, RG)[None, :, None, None]
        expert = tl.load(ids + slot, mask=slot < SLOTS, other=0, cache_modifier=".cg").to(tl.int64)
        weight = tl.load(weights + slot, mask=slot < SLOTS, other=0.0, cache_modifier=".cg")
        for k in tl.static_range(steps):
            c = columns(k * (L * 8), L)
            at = w + expert * (H * F) + n * F + c
            if i * RG + RG <= SLOTS and F % (L * 8) == 0 and H % RW == 0:
                tiles = tiles + (tl.load(at, eviction_policy="evict_first"),)
            else:
                tiles = tiles + (tl.load(at, mask=(slot < SLOTS) & (n < H) & (c < F), other=0.0,
                                         eviction_policy="evict_first"),)
            if SCALED:
                b = k * (L * 8) + tl.arange(0, L)[:, None, None, None] * 8
                place = s + expert * blocks + (row0 // 128) * ((F + 127) // 128) + b // 128
                factors = factors + (weight * tl.load(place, mask=(b < F) & (slot < SLOTS), other=0.0),)
            else:
                factors = factors + (weight,)
    begin(PDL)
    inner, addend = (), 0.0
    for i in tl.static_range(passes):
        slot = i * RG + tl.arange(0, RG)[None, :, None, None]
        for k in tl.static_range(steps):
            c = columns(k * (L * 8), L)
            inner = inner + (tl.load(h + slot * F + c, mask=(slot < SLOTS) & (c < F), other=0.0),)
    if ADD:
        addend = tl.load(r + n, mask=n < H, other=0.0).to(tl.float32)
    all_asked(PDL)
    acc = tl.zeros((L, RG, RW, 1), tl.float32)
    for k in tl.static_range(passes * steps):
        acc += tl.sum(to_f32(tiles[k]) * (inner[k].to(tl.float32) * factors[k]), 3, keep_dims=True)
    out = tl.sum(tl.sum(acc, 0, keep_dims=True), 1, keep_dims=True)
    if ADD:
        out = rounded(out) + addend
    tl.store(y + n, out.to(tl.bfloat16), mask=n < H)
