"""Experts with weights of four bits, two codes a byte (the first in the low half), a scale for G of a row.

NVFP4, G 16: e2m1 codes, e4m3 scales, one f32 scale `g` for an expert's matrix. INT4, G 128: code + 8, f16 scales, no g.
Products run on tensor cores as with bf16 weights: code times scale is exact in bf16 with NVFP4, rounded with INT4; g is
applied to the sums. Pairs, tiles and their order as in `moe.py` and `moe_tiles.py`; one token in `four_one.py`.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, silu, to_f32
from qcn_compile.targets.triton.kernels.four_one import code_values
from qcn_compile.targets.triton.kernels.gemm import columns, tile_sum
from qcn_compile.targets.triton.kernels.moe_tiles import pairs_of


@triton.jit
def four_tile(w, s, n, k0, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr):
    """Codes times scales of rows n [BN], columns k0 to k0 + BK, f32."""
    groups: tl.constexpr = (K + G - 1) // G
    b, k = k0 // 2 + tl.arange(0, BK // 2), k0 + tl.arange(0, BK)
    width: tl.constexpr = groups * (G // 2)
    pairs = tl.load(w + n[:, None] * width + b[None, :], mask=(b < width)[None, :], other=0)
    codes = tl.reshape(tl.join(pairs & 15, pairs >> 4), (BN, BK))
    scale = tl.load(s + n[:, None] * groups + (k // G)[None, :], mask=(k < K)[None, :], other=0.0)
    return code_values(codes, G == 128) * to_f32(scale)


@triton.jit
def whole_scale(g, expert, G: tl.constexpr):
    """The scale of an expert's matrix."""
    if G == 128:
        return 1.0
    else:
        return tl.load(g + expert)


@triton.jit
def four_up(x, ids, w, s, g, h, counts, SLOTS: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
            BK: tl.constexpr, SX: tl.constexpr, G: tl.constexpr, PDL: tl.constexpr):
    """h[pair] = silu(gate x) * up x. Grid (F/BF, SLOTS, T); w [E, 2F, H], gate above up."""
    t, f = tl.program_id(2), tl.program_id(0) * BF + tl.arange(0, BF)
    pair, rows = t * SLOTS + tl.program_id(1), tl.minimum(f, F - 1)
    groups: tl.constexpr = 2 * F * ((H + G - 1) // G)
    begin(PDL)
    if t < tl.load(counts):
        expert = tl.load(ids + pair).to(tl.int64)
        we, se = w + expert * (groups * (G // 2)), s + expert * groups
        a = tl.zeros((BF, BK), tl.float32)
        b = tl.zeros((BF, BK), tl.float32)
        for k0 in range(0, H, BK):
            k = k0 + tl.arange(0, BK)
            v = tl.load(x + t * SX + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
            a += four_tile(we, se, rows, k0, H, BF, BK, G) * v
            b += four_tile(we, se, rows + F, k0, H, BF, BK, G) * v
        scale = whole_scale(g, expert, G)
        out = silu(tl.sum(a, 1) * scale) * (tl.sum(b, 1) * scale)
        tl.store(h + pair * F + f, out.to(tl.bfloat16), mask=f < F)


@triton.jit
def four_down(h, ids, weights, w, s, g, r, y, counts, SLOTS: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
              BF: tl.constexpr, BH: tl.constexpr, SR: tl.constexpr, ADD: tl.constexpr, G: tl.constexpr,
              PDL: tl.constexpr):
    """y = (r +) sum over slots of weight * down h, in the order of the slots. Grid (H/BH, T); w [E, H, F]."""
    t, n = tl.program_id(1), tl.program_id(0) * BH + tl.arange(0, BH)
    rows, f = tl.minimum(n, H - 1), tl.arange(0, BF)
    groups: tl.constexpr = H * ((F + G - 1) // G)
    begin(PDL)
    if t < tl.load(counts):
        acc = tl.zeros((BH, BF), tl.float32)
        for j in range(SLOTS):
            expert = tl.load(ids + t * SLOTS + j).to(tl.int64)
            factor = tl.load(weights + t * SLOTS + j) * whole_scale(g, expert, G)
            v = tl.load(h + (t * SLOTS + j) * F + f, mask=f < F, other=0.0).to(tl.float32) * factor
            acc += four_tile(w + expert * (groups * (G // 2)), s + expert * groups, rows, 0, F, BH, BF, G) * v[None, :]
        out = tl.sum(acc, 1)
        if ADD:
            out = out.to(tl.bfloat16).to(tl.float32) + tl.load(r + t * SR + n, mask=n < H, other=0.0).to(tl.float32)
        tl.store(y + t * H + n, out.to(tl.bfloat16), mask=n < H)


@triton.jit
def four_sum(acc, v, w, s, n, k0, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
             SWAP: tl.constexpr):
    """acc + v times the columns k0 to k0 + BK of rows n."""
    return tile_sum(acc, v, four_tile(w, s, n, k0, K, BN, BK, G).to(tl.bfloat16), 1.0, 1.0, False, False, True, SWAP)


@triton.jit
def four_up_tiles(x, order, owner, found, first, w, s, g, h, counts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr,
                  H: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr,
                  SX: tl.constexpr, G: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr):
    """h = silu(gate x) * up x of TILE pairs of one expert. Grid (tiles * F/BF); w [E, 2F, H], gate above up."""
    across: tl.constexpr = (F + BF - 1) // BF
    groups: tl.constexpr = 2 * F * ((H + G - 1) // G)
    number, part = tl.program_id(0) // across, tl.program_id(0) % across
    begin(PDL)
    if number < tl.load(first + EXPERTS):
        expert, pair, there = pairs_of(number, order, owner, found, first, TILE)
        f = part * BF + tl.arange(0, BF)
        rows, we, se = tl.minimum(f, F - 1), w + expert * (groups * (G // 2)), s + expert * groups
        x_rows = x + (pair // SLOTS)[:, None] * SX
        a = tl.zeros((BF, TILE) if SWAP else (TILE, BF), tl.float32)
        b = tl.zeros((BF, TILE) if SWAP else (TILE, BF), tl.float32)
        for k0 in range(0, H, BK):
            v = columns(x_rows, k0, H, BK)
            a = four_sum(a, v, we, se, rows, k0, H, BF, BK, G, SWAP)
            b = four_sum(b, v, we, se, rows + F, k0, H, BF, BK, G, SWAP)
        scale = whole_scale(g, expert, G)
        out = silu(a * scale) * (b * scale)
        if SWAP:
            out = tl.trans(out)
        place = number * TILE + tl.arange(0, TILE)
        tl.store(h + place[:, None] * F + f[None, :], out.to(tl.bfloat16), mask=there[:, None] & (f < F)[None, :])


@triton.jit
def four_down_tiles(h, order, owner, found, first, w, s, g, o, counts, EXPERTS: tl.constexpr, H: tl.constexpr,
                    F: tl.constexpr, BH: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
                    SWAP: tl.constexpr, PDL: tl.constexpr):
    """o[pair] = down h of TILE pairs of one expert. Grid (tiles * H/BH); w [E, H, F]."""
    across: tl.constexpr = (H + BH - 1) // BH
    groups: tl.constexpr = H * ((F + G - 1) // G)
    number, part = tl.program_id(0) // across, tl.program_id(0) % across
    begin(PDL)
    if number < tl.load(first + EXPERTS):
        expert, pair, there = pairs_of(number, order, owner, found, first, TILE)
        n = part * BH + tl.arange(0, BH)
        rows, we, se = tl.minimum(n, H - 1), w + expert * (groups * (G // 2)), s + expert * groups
        h_rows = h + (number * TILE + tl.arange(0, TILE))[:, None] * F
        acc = tl.zeros((BH, TILE) if SWAP else (TILE, BH), tl.float32)
        for k0 in range(0, F, BK):
            acc = four_sum(acc, columns(h_rows, k0, F, BK), we, se, rows, k0, F, BH, BK, G, SWAP)
        acc *= whole_scale(g, expert, G)
        if SWAP:
            acc = tl.trans(acc)
        tl.store(o + pair[:, None] * H + n[None, :], acc.to(tl.bfloat16), mask=there[:, None] & (n < H)[None, :])
