"""Experts of one token with weights of four bits: tiles as in `single.py`, C words of eight codes of a row to a lane.

A code becomes a number by one mask where it lies: an int4 code as a denormal number, exactly. The powers of two that
this is too small by are in x. Codes are read as i32 words, x as i32 words of two bf16, so that every operand of a
product is a tensor of one shape and no value changes lanes.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import all_asked, begin, rounded, silu, to_f32
from qcn_compile.targets.triton.kernels.single import pair_sum


@triton.jit
def lane_words(k0, L: tl.constexpr, C: tl.constexpr):
    """Numbers [L, 1, 1, C] of the words of codes of the columns from k0."""
    return k0 // 8 + tl.arange(0, L)[:, None, None, None] * C + tl.arange(0, C)[None, None, None, :]


@triton.jit
def code_values(codes, INT4: tl.constexpr):
    """Four bits in a byte -> f32: n - 8, through the number 16 + n; or e2m1, through the fp16 2^14 times smaller."""
    if INT4:
        return ((codes.to(tl.int32) << 19) | 0x41800000).to(tl.float32, bitcast=True) - 24.0
    else:
        wide = codes.to(tl.uint16)
        return (((wide & 8) << 12) | ((wide & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def column_values(x, inside, k0, K: tl.constexpr, L: tl.constexpr, RG: tl.constexpr, C: tl.constexpr):
    """Columns k0 to k0 + 8 L C of x as four tensors of i32 words [L, RG, 1, C]: x[2q], x[2q + 1] of every eight."""
    at = lane_words(k0, L, C) * 4 + tl.arange(0, RG)[None, :, None, None] * 0
    found = ()
    for q in tl.static_range(4):
        found = found + (tl.load(x + at + q, mask=inside & (at + q < K // 2), other=0),)
    return found


@triton.jit
def placed(word, place: tl.constexpr, INT4: tl.constexpr):
    """The code in a place of four bits (0 to 4) of each word, as f32. int4: n, as the bits of a denormal number, which
    are 2^149 times smaller and the place's power larger; e2m1: 2^-126 times its value."""
    if INT4:
        return (word & (0xF << (4 * place))).to(tl.float32, bitcast=True)
    else:
        bits = ((word << (28 - 4 * place)) & -2147483648) | ((word << (22 - 4 * place)) & 0x01C00000)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def raised(x, place: tl.constexpr, INT4: tl.constexpr):
    """x, times what makes up for its code's place and, in part, for the smallness of all codes."""
    return x * (16.0 ** (20 - place) if INT4 else 2.0 ** 64)


@triton.jit
def half(words, odd: tl.constexpr):
    """The first or second of the two bf16 of a word, as f32."""
    if odd:
        return (words & -65536).to(tl.float32, bitcast=True)
    else:
        return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def four_part(tile, xs, scales, INT4: tl.constexpr):
    """What the columns of a tile add to its rows, [L, RG, RW, 1]. The last three of eight codes are moved down."""
    late = tile >> 12
    part = placed(tile, 0, INT4) * raised(half(xs[0], False), 0, INT4)
    columns = half(xs[0], False)
    for j in tl.static_range(1, 8):
        x = half(xs[j // 2], j % 2 == 1)
        part += placed(tile if j < 5 else late, j if j < 5 else j - 3, INT4) * raised(x, j if j < 5 else j - 3, INT4)
        columns += x
    total = tl.sum(part, 3, keep_dims=True)
    if INT4:  # n - 8 is meant: what only x is in is counted once a lane
        return (total * 2.0 ** 69 - tl.sum(columns, 3, keep_dims=True) * 8.0) * scales
    else:
        return total * scales * 2.0 ** 62


@triton.jit
def four_rows(w, row, there, k0, K: tl.constexpr, L: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
              FULL: tl.constexpr):
    """Words [L, RG, RW, C] of rows whose first word is w[row]; masked by `there` and the end of a row unless FULL."""
    at = lane_words(k0, L, C)
    if FULL:
        return tl.load(w + row + at, eviction_policy="evict_first")
    else:
        there = there & (at < (K + G - 1) // G * (G // 8))
        return tl.load(w + row + at, mask=there, other=0, eviction_policy="evict_first")


@triton.jit
def four_scales(s, row, there, k0, K: tl.constexpr, L: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
                FULL: tl.constexpr):
    """Scales [L, RG, RW, 1] of rows whose first scale is s[row]."""
    k = k0 + tl.arange(0, L)[:, None, None, None] * (8 * C)
    if FULL:
        return tl.load(s + row + k // G)
    else:
        return tl.load(s + row + k // G, mask=there & (k < K), other=0.0)


@triton.jit
def four_up_rows(x, ids, w, s, g, h, slot, EXPERT: tl.constexpr, H: tl.constexpr, F: tl.constexpr, L: tl.constexpr,
                 RG: tl.constexpr, RW: tl.constexpr, C: tl.constexpr, G: tl.constexpr, INT4: tl.constexpr,
                 PDL: tl.constexpr):
    """RG * RW rows of one slot, as `up_rows` in single.py."""
    span: tl.constexpr = L * C * 8
    steps: tl.constexpr = (H + span - 1) // span
    full: tl.constexpr = H % span == 0 and F % (RG * RW) == 0
    groups: tl.constexpr = (H + G - 1) // G
    f = tl.program_id(0) * (RG * RW) + tl.arange(0, RG)[None, :, None, None] * RW
    f += tl.arange(0, RW)[None, None, :, None]
    if EXPERT < 0:
        begin(PDL)
        expert = tl.load(ids + slot).to(tl.int64)
    else:
        expert = tl.full((), EXPERT, tl.int64)
    we, se = w + expert * (2 * F * groups * (G // 8)), s + expert * (2 * F * groups)
    gates, ups, gate_scales, up_scales = (), (), (), ()
    for k in tl.static_range(0, steps * span, span):
        gates = gates + (four_rows(we, f * (groups * (G // 8)), f < F, k, H, L, C, G, full),)
        ups = ups + (four_rows(we, (f + F) * (groups * (G // 8)), f < F, k, H, L, C, G, full),)
        gate_scales = gate_scales + (four_scales(se, f * groups, f < F, k, H, L, C, G, full),)
        up_scales = up_scales + (four_scales(se, (f + F) * groups, f < F, k, H, L, C, G, full),)
    if EXPERT < 0:
        all_asked(PDL)
    else:
        begin(PDL)
    a = tl.zeros((L, RG, RW, 1), tl.float32)
    b = tl.zeros((L, RG, RW, 1), tl.float32)
    for k in tl.static_range(steps):
        xs = column_values(x, True, k * span, H, L, RG, C)
        a += four_part(gates[k], xs, to_f32(gate_scales[k]), INT4)
        b += four_part(ups[k], xs, to_f32(up_scales[k]), INT4)
    a, b = tl.reduce((a, b), 0, pair_sum, keep_dims=True)
    if not INT4:
        whole = tl.load(g + expert)
        a, b = a * whole, b * whole
    tl.store(h + slot * F + f, (silu(a) * b).to(tl.bfloat16), mask=f < F)


@triton.jit
def four_up_one(x, ids, w, s, g, h, SLOTS: tl.constexpr, SHARED: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
                L: tl.constexpr, RG: tl.constexpr, RW: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
                INT4: tl.constexpr, PDL: tl.constexpr):
    """h[slot] = silu(gate x) * up x. Grid (F / (RG RW), slots); w [E, 2F, H], gate above up. SHARED as in single.py."""
    if SHARED >= 0:
        if tl.program_id(1) == 0:
            four_up_rows(x, ids, w, s, g, h, SLOTS - 1, SHARED, H, F, L, RG, RW, C, G, INT4, PDL)
        else:
            four_up_rows(x, ids, w, s, g, h, tl.program_id(1) - 1, -1, H, F, L, RG, RW, C, G, INT4, PDL)
    else:
        four_up_rows(x, ids, w, s, g, h, tl.program_id(1), -1, H, F, L, RG, RW, C, G, INT4, PDL)


@triton.jit
def four_down_one(h, ids, weights, w, s, g, r, y, SLOTS: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
                  L: tl.constexpr, RG: tl.constexpr, RW: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
                  ADD: tl.constexpr, INT4: tl.constexpr, PDL: tl.constexpr):
    """y = (r +) sum over slots of weight * down h[slot]. Grid (H / RW): RW rows, RG slots side by side; w [E, H, F].
    All rows are asked for before the kernel in front (four_up_one) has ended: the experts are older."""
    span: tl.constexpr = L * C * 8
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
            tiles = tiles + (four_rows(w, row * (groups * (G // 8)), there, k, F, L, C, G,
                                       even and (i + 1) * RG <= SLOTS),)
            scale = four_scales(s, row * groups, there, k, F, L, C, G, even and (i + 1) * RG <= SLOTS)
            factors = factors + (to_f32(scale) * weight,)
    begin(PDL)
    acc = tl.zeros((L, RG, RW, 1), tl.float32)
    for i in tl.static_range(passes):
        slot = i * RG + tl.arange(0, RG)[None, :, None, None]
        for k in tl.static_range(steps):
            xs = column_values(h + slot * (F // 2), slot < SLOTS, k * span, F, L, RG, C)
            acc += four_part(tiles[i * steps + k], xs, factors[i * steps + k], INT4)
    out = tl.sum(tl.sum(acc, 0, keep_dims=True), 1, keep_dims=True)
    if ADD:
        out = rounded(out) + tl.load(r + n, mask=n < H, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(tl.bfloat16), mask=n < H)
