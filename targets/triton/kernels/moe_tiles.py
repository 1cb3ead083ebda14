"""Experts for many tokens: pairs (token, slot) sorted by expert into tiles, products on tensor cores.

    rank [pairs]      place of a pair among those of its expert (any order: no result depends on it)
    found [E]         pairs of an expert            first [E+1]   its first tile, at the end the number of tiles
    owner [tiles]     expert of a tile              order [tiles * TILE]   pair at each place, unset beyond `found`
h [tiles * TILE, F] is in sorted order, o [pairs, H] in the order of the pairs.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, narrowed, silu
from qcn_compile.targets.triton.kernels.gemm import columns, tile_sum, weight_scale


@triton.jit
def moe_clear(found, counts, EXPERTS: tl.constexpr, BE: tl.constexpr, PDL: tl.constexpr):
    """found = 0. Grid (1)."""
    e = tl.arange(0, BE)
    begin(PDL)
    tl.store(found + e, tl.zeros((BE,), tl.int32), mask=e < EXPERTS)


@triton.jit
def ranked(ids, found, rank, p, pairs):
    """Number pairs p within their experts, counting them in `found`."""
    inside = p < pairs
    expert = tl.load(ids + p, mask=inside, other=0)
    tl.store(rank + p, tl.atomic_add(found + expert, 1, mask=inside, sem="relaxed"), mask=inside)


@triton.jit
def tiled(found, first, owner, EXPERTS: tl.constexpr, BE: tl.constexpr, TILE: tl.constexpr):
    """first and owner from found."""
    e = tl.arange(0, BE)
    tiles = (tl.load(found + e, mask=e < EXPERTS, other=0, cache_modifier=".cg") + TILE - 1) // TILE
    after = tl.cumsum(tiles, 0)
    tl.store(first + e, after - tiles, mask=e <= EXPERTS)
    for j in range(tl.max(tiles, 0)):
        tl.store(owner + after - tiles + j, e, mask=j < tiles)


@triton.jit
def placed(ids, rank, first, order, p, pairs, TILE: tl.constexpr):
    """order from first and rank."""
    inside = p < pairs
    expert = tl.load(ids + p, mask=inside, other=0)
    at = tl.load(first + expert, mask=inside, other=0, cache_modifier=".cg") * TILE
    tl.store(order + at + tl.load(rank + p, mask=inside, other=0), p, mask=inside)


@triton.jit
def moe_rank(ids, found, rank, counts, SLOTS: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr):
    """Grid (pairs/BP)."""
    begin(PDL)
    ranked(ids, found, rank, tl.program_id(0) * BP + tl.arange(0, BP), tl.load(counts) * SLOTS)


@triton.jit
def moe_tile(found, first, owner, counts, EXPERTS: tl.constexpr, BE: tl.constexpr, TILE: tl.constexpr,
             PDL: tl.constexpr):
    """Grid (1). BE > EXPERTS."""
    begin(PDL)
    tiled(found, first, owner, EXPERTS, BE, TILE)


@triton.jit
def moe_order(ids, rank, first, order, counts, SLOTS: tl.constexpr, BP: tl.constexpr, TILE: tl.constexpr,
              PDL: tl.constexpr):
    """Grid (pairs/BP)."""
    begin(PDL)
    placed(ids, rank, first, order, tl.program_id(0) * BP + tl.arange(0, BP), tl.load(counts) * SLOTS, TILE)


@triton.jit
def moe_sort(ids, found, rank, first, owner, order, counts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr,
             BE: tl.constexpr, BP: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
    """All of it in one program, for up to BP pairs. Grid (1)."""
    e, p = tl.arange(0, BE), tl.arange(0, BP)
    begin(PDL)
    pairs = tl.load(counts) * SLOTS
    tl.store(found + e, tl.zeros((BE,), tl.int32), mask=e < EXPERTS)
    tl.debug_barrier()
    ranked(ids, found, rank, p, pairs)
    tl.debug_barrier()
    tiled(found, first, owner, EXPERTS, BE, TILE)
    tl.debug_barrier()
    placed(ids, rank, first, order, p, pairs, TILE)


@triton.jit
def pairs_of(number, order, owner, found, first, TILE: tl.constexpr):
    """(expert, pairs [TILE], which of them there are) of a tile."""
    expert = tl.load(owner + number)
    place = number * TILE + tl.arange(0, TILE)
    there = place - tl.load(first + expert) * TILE < tl.load(found + expert)
    return expert.to(tl.int64), tl.load(order + place, mask=there, other=0), there


@triton.jit
def sorted_rows(x_rows, scales, k0, K: tl.constexpr, BK: tl.constexpr, NARROW: tl.constexpr):
    """Columns k0 to k0 + BK of activations, and with NARROW the scales of these 128."""
    if NARROW:
        return columns(x_rows, k0, K, BK), tl.load(scales + k0 // 128)
    else:
        return columns(x_rows, k0, K, BK), 1.0


@triton.jit
def expert_sum(acc, v, x_scale, w, s, row0, n, k0, K: tl.constexpr, BK: tl.constexpr, NARROW: tl.constexpr,
               SCALED: tl.constexpr, ALIGNED: tl.constexpr, SWAP: tl.constexpr):
    """acc + v times the columns k0 to k0 + BK of rows n of an expert's matrix."""
    scale = 1.0
    if SCALED:
        scale = weight_scale(s, row0, n, k0, K, ALIGNED)
    return tile_sum(acc, v, columns(w + n[:, None] * K, k0, K, BK), x_scale, scale, NARROW, SCALED, ALIGNED, SWAP)


@triton.jit
def moe_up_tiles(x, xs, order, owner, found, first, w, s, h, hs, counts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr,
                 H: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr,
                 SX: tl.constexpr, SCALED: tl.constexpr, NARROW: tl.constexpr, SWAP: tl.constexpr, TWICE: tl.constexpr,
                 PDL: tl.constexpr):
    """h = silu(gate x) * up x of TILE pairs of one expert, with NARROW in e4m3 with scales hs [tiles, F/BF, TILE].
    Grid (tiles * F/BF); w [E, 2F, H], gate above up."""
    across: tl.constexpr = (F + BF - 1) // BF
    number, part = tl.program_id(0) // across, tl.program_id(0) % across
    begin(PDL)
    if number < tl.load(first + EXPERTS):
        expert, pair, there = pairs_of(number, order, owner, found, first, TILE)
        token = pair // SLOTS
        f, row0 = part * BF + tl.arange(0, BF), part * BF
        gate_n = tl.minimum(f, F - 1)
        up_n = gate_n + F
        blocks: tl.constexpr = ((2 * F + 127) // 128) * ((H + 127) // 128)
        experts_w, experts_s = w + expert * (2 * F * H), s
        if SCALED:
            experts_s = s + expert * blocks
        aligned: tl.constexpr = 128 % BF == 0 and F % 128 == 0
        x_rows, scales = x + token[:, None] * SX, xs
        if NARROW:
            scales = xs + token * ((H + 127) // 128)
        a = tl.zeros((BF, TILE) if SWAP else (TILE, BF), tl.float32)
        b = tl.zeros((BF, TILE) if SWAP else (TILE, BF), tl.float32)
        if TWICE:  # large tiles: one sum at a time, or registers run out
            for k0 in range(0, H, BK):
                v, x_scale = sorted_rows(x_rows, scales, k0, H, BK, NARROW)
                a = expert_sum(a, v, x_scale, experts_w, experts_s, row0, gate_n, k0, H, BK, NARROW, SCALED, aligned,
                               SWAP)
            for k0 in range(0, H, BK):
                v, x_scale = sorted_rows(x_rows, scales, k0, H, BK, NARROW)
                b = expert_sum(b, v, x_scale, experts_w, experts_s, row0 + F, up_n, k0, H, BK, NARROW, SCALED, aligned,
                               SWAP)
        else:
            for k0 in range(0, H, BK):
                v, x_scale = sorted_rows(x_rows, scales, k0, H, BK, NARROW)
                a = expert_sum(a, v, x_scale, experts_w, experts_s, row0, gate_n, k0, H, BK, NARROW, SCALED, aligned,
                               SWAP)
                b = expert_sum(b, v, x_scale, experts_w, experts_s, row0 + F, up_n, k0, H, BK, NARROW, SCALED, aligned,
                               SWAP)
        out = silu(a) * b
        if SWAP:
            out = tl.trans(out)
        place = number * TILE + tl.arange(0, TILE)
        inside = there[:, None] & (f < F)[None, :]
        if NARROW:
            codes, scale = narrowed(tl.where((f < F)[None, :], out, 0.0), TILE, BF, BF)
            tl.store(h + place[:, None] * F + f[None, :], codes, mask=inside)
            at = hs + (number * across + part) * TILE + tl.arange(0, TILE)
            tl.store(at, tl.reshape(scale, (TILE,)), mask=there)
        else:
            tl.store(h + place[:, None] * F + f[None, :], out.to(tl.bfloat16), mask=inside)


@triton.jit
def moe_down_tiles(h, hs, order, owner, found, first, w, s, o, counts, EXPERTS: tl.constexpr, H: tl.constexpr,
                   F: tl.constexpr, BH: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
                   NARROW: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr):
    """o[pair] = down h of TILE pairs of one expert. Grid (tiles * H/BH); w [E, H, F], BK a group of hs."""
    across: tl.constexpr = (H + BH - 1) // BH
    number, part = tl.program_id(0) // across, tl.program_id(0) % across
    begin(PDL)
    if number < tl.load(first + EXPERTS):
        expert, pair, there = pairs_of(number, order, owner, found, first, TILE)
        place, row0 = number * TILE + tl.arange(0, TILE), part * BH
        n = row0 + tl.arange(0, BH)
        rows = tl.minimum(n, H - 1)
        blocks: tl.constexpr = ((H + 127) // 128) * ((F + 127) // 128)
        h_rows, w_rows, experts_s = h + place[:, None] * F, w + expert * (H * F) + rows[:, None] * F, s
        if SCALED:
            experts_s = s + expert * blocks
        aligned: tl.constexpr = 128 % BH == 0
        acc = tl.zeros((BH, TILE) if SWAP else (TILE, BH), tl.float32)
        for k0 in range(0, F, BK):
            h_scale, w_scale = 1.0, 1.0
            if NARROW:
                group = number * ((F + BK - 1) // BK) + k0 // BK
                h_scale = tl.load(hs + group * TILE + tl.arange(0, TILE))
            if SCALED:
                w_scale = weight_scale(experts_s, row0, rows, k0, F, aligned)
            acc = tile_sum(acc, columns(h_rows, k0, F, BK), columns(w_rows, k0, F, BK), h_scale, w_scale, NARROW,
                           SCALED, aligned, SWAP)
        if SWAP:
            acc = tl.trans(acc)
        tl.store(o + pair[:, None] * H + n[None, :], acc.to(tl.bfloat16), mask=there[:, None] & (n < H)[None, :])


@triton.jit
def moe_combine(o, weights, r, y, counts, SLOTS: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, SR: tl.constexpr,
                ADD: tl.constexpr, PDL: tl.constexpr):
    """y[t] = (r[t] +) sum over slots of weight * o[pair], in order. Grid (T, H/BH)."""
    t, n = tl.program_id(0), tl.program_id(1) * BH + tl.arange(0, BH)
    begin(PDL)
    if t < tl.load(counts):
        out = tl.zeros((BH,), tl.float32)
        for j in tl.static_range(SLOTS):
            pair = t * SLOTS + j
            out += tl.load(weights + pair) * tl.load(o + pair * H + n, mask=n < H, other=0.0).to(tl.float32)
        if ADD:
            out = out.to(tl.bfloat16).to(tl.float32) + tl.load(r + t * SR + n, mask=n < H, other=0.0).to(tl.float32)
        tl.store(y + t * H + n, out.to(tl.bfloat16), mask=n < H)
