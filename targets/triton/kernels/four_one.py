"""Experts of one token with weights of four bits: tiles as in `single.py`, C bytes (2 C codes) of a row to a lane.

x comes as i32 words, two bf16 each, so that the two codes of a byte meet their two values without moving between lanes:
the upper half of a word is its second value in f32, the lower half, shifted up, its first.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, rounded, silu, to_f32
from qcn_compile.targets.triton.kernels.single import pair_sum


@triton.jit
def lane_bytes(k0, L: tl.constexpr, C: tl.constexpr):
    """Byte numbers [L, 1, 1, C] of the columns from k0."""
    return k0 // 2 + tl.arange(0, L)[:, None, None, None] * C + tl.arange(0, C)[None, None, None, :]


@triton.jit
def word_tile(x, k0, K: tl.constexpr, L: tl.constexpr, RG: tl.constexpr, C: tl.constexpr):
    """Columns k0 to k0 + 2 L C of x as words [L, RG, 1, C]. Read past the first cache."""
    at = lane_bytes(k0, L, C) + tl.arange(0, RG)[None, :, None, None] * 0
    return tl.load(x + at, mask=at < K // 2, other=0, cache_modifier=".cg")


@triton.jit
def first_values(words):
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def second_values(words):
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def code_values(codes, INT4: tl.constexpr):
    """Four bits in a byte -> f32: n - 8, through the number 16 + n; or e2m1, through the fp16 2^14 times smaller."""
    if INT4:
        return ((codes.to(tl.int32) << 19) | 0x41800000).to(tl.float32, bitcast=True) - 24.0
    else:
        wide = codes.to(tl.uint16)
        return (((wide & 8) << 12) | ((wide & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def raised(n, up: tl.constexpr):
    """16 + n for n < 16 and `up` 19, 16 + n/16 for n < 256 and `up` 15: n becomes the head of an f32's fraction."""
    return ((n << up) + 0x41800000).to(tl.float32, bitcast=True)


@triton.jit
def four_part(tile, words, scales, INT4: tl.constexpr):
    """What the columns of a tile add to its rows, [L, RG, RW, 1]."""
    a, b = first_values(words), second_values(words)
    if INT4:  # (m - 8) a + (n - 8) b of a byte m + 16 n, in few instructions; what only x is in is counted once a lane
        wide = tile.to(tl.int32)
        c = a - b * 0.0625
        part = tl.sum(raised(wide & 15, 19) * c + raised(wide, 15) * b, 3, keep_dims=True)
        return (part - tl.sum(16.0 * (b + c) + 8.0 * (a + b), 3, keep_dims=True)) * scales
    else:
        part = code_values(tile & 15, INT4) * a + code_values(tile >> 4, INT4) * b
        return tl.sum(part, 3, keep_dims=True) * scales


@triton.jit
def four_rows(w, row, there, k0, K: tl.constexpr, L: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
              FULL: tl.constexpr):
    """Bytes [L, RG, RW, C] of rows whose first byte is w[row]; masked by `there` and the end of a row unless FULL."""
    at = lane_bytes(k0, L, C)
    if FULL:
        return tl.load(w + row + at)
    else:
        return tl.load(w + row + at, mask=there & (at < (K + G - 1) // G * (G // 2)), other=0)


@triton.jit
def four_scales(s, row, there, k0, K: tl.constexpr, L: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
                FULL: tl.constexpr):
    """Scales [L, RG, RW, 1], f32, of rows whose first scale is s[row]."""
    k = k0 + tl.arange(0, L)[:, None, None, None] * (2 * C)
    if FULL:
        return to_f32(tl.load(s + row + k // G))
    else:
        return to_f32(tl.load(s + row + k // G, mask=there & (k < K), other=0.0))


@triton.jit
def four_up_one(x, ids, w, s, g, h, H: tl.constexpr, F: tl.constexpr, L: tl.constexpr, RG: tl.constexpr,
                RW: tl.constexpr, C: tl.constexpr, G: tl.constexpr, INT4: tl.constexpr, PDL: tl.constexpr):
    """h[slot] = silu(gate x) * up x. Grid (F / (RG RW), slots); w [E, 2F, H], gate above up. x is read before the wait:
    it is older than the choice of experts, which the kernel in front makes."""
    span: tl.constexpr = L * C * 2
    steps: tl.constexpr = (H + span - 1) // span
    full: tl.constexpr = H % span == 0 and F % (RG * RW) == 0
    groups: tl.constexpr = (H + G - 1) // G
    f = tl.program_id(0) * (RG * RW) + tl.arange(0, RG)[None, :, None, None] * RW
    f += tl.arange(0, RW)[None, None, :, None]
    slot = tl.program_id(1)
    xs = ()
    for k in tl.static_range(steps):
        xs = xs + (word_tile(x, k * span, H, L, RG, C),)
    begin(PDL)
    expert = tl.load(ids + slot).to(tl.int64)
    we, se = w + expert * (F * groups * G), s + expert * (2 * F * groups)
    gates, ups, gate_scales, up_scales = (), (), (), ()
    for k in tl.static_range(0, steps * span, span):
        gates = gates + (four_rows(we, f * (groups * G // 2), f < F, k, H, L, C, G, full),)
        ups = ups + (four_rows(we, (f + F) * (groups * G // 2), f < F, k, H, L, C, G, full),)
        gate_scales = gate_scales + (four_scales(se, f * groups, f < F, k, H, L, C, G, full),)
        up_scales = up_scales + (four_scales(se, (f + F) * groups, f < F, k, H, L, C, G, full),)
    a = tl.zeros((L, RG, RW, 1), tl.float32)
    b = tl.zeros((L, RG, RW, 1), tl.float32)
    for k in tl.static_range(steps):
        a += four_part(gates[k], xs[k], gate_scales[k], INT4)
        b += four_part(ups[k], xs[k], up_scales[k], INT4)
    a, b = tl.reduce((a, b), 0, pair_sum, keep_dims=True)
    if not INT4:
        whole = tl.load(g + expert)
        a, b = a * whole, b * whole
    tl.store(h + slot * F + f, (silu(a) * b).to(tl.bfloat16), mask=f < F)


@triton.jit
def four_down_one(h, ids, weights, w, s, g, r, y, SLOTS: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
                  L: tl.constexpr, RG: tl.constexpr, RW: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
                  ADD: tl.constexpr, INT4: tl.constexpr, PDL: tl.constexpr):
    """y = (r +) sum over slots of weight * down h[slot]. Grid (H / RW): RW rows, RG slots side by side; w [E, H, F].
    All rows are asked for before the kernel in front (four_up_one) has ended: the experts are older."""
    span: tl.constexpr = L * C * 2
    steps: tl.constexpr = (F + span - 1) // span
    even: tl.constexpr = F % span == 0 and H % RW == 0
    passes: tl.constexpr = (SLOTS + RG - 1) // RG
    groups: tl.constexpr = (F + G - 1) // G
    n = tl.program_id(0) * RW + tl.arange(0, RW)[None, None, :, None]
    tiles, factors = (), ()
    for i in tl.static_range(passes):
        slot = i * RG + tl.arange(0, RG)[None, :, None, None]
        expert = tl.load(ids + slot, mask=slot < SLOTS, other=0, cache_modifier=".cg").to(tl.int64)
        weight = tl.load(weights + slot, mask=slot < SLOTS, other=0.0, cache_modifier=".cg")
        if not INT4:
            weight *= tl.load(g + expert)
        there = (slot < SLOTS) & (n < H)
        row = expert * H + n
        for k in tl.static_range(0, steps * span, span):
            if i * RG + RG <= SLOTS:
                tiles = tiles + (four_rows(w, row * (groups * G // 2), there, k, F, L, C, G, even),)
                factors = factors + (four_scales(s, row * groups, there, k, F, L, C, G, even) * weight,)
            else:
                tiles = tiles + (four_rows(w, row * (groups * G // 2), there, k, F, L, C, G, False),)
                factors = factors + (four_scales(s, row * groups, there, k, F, L, C, G, False) * weight,)
    begin(PDL)
    acc = tl.zeros((L, RG, RW, 1), tl.float32)
    for i in tl.static_range(passes):
        slot = i * RG + tl.arange(0, RG)[None, :, None, None]
        for k in tl.static_range(steps):
            at = lane_bytes(k * span, L, C)
            words = tl.load(h + slot * (F // 2) + at, mask=(slot < SLOTS) & (at < F // 2), other=0)
            acc += four_part(tiles[i * steps + k], words, factors[i * steps + k], INT4)
    out = tl.sum(tl.sum(acc, 0, keep_dims=True), 1, keep_dims=True)
    if ADD:
        out = rounded(out) + tl.load(r + n, mask=n < H, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(tl.bfloat16), mask=n < H)
