"""Router and experts. A pair is (token, slot), numbered token * SLOTS + slot; its expert is ids[pair]."""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, silu, to_f32
from qcn_compile.targets.triton.kernels.linear import row_dot, scales, tile, tile_dot


@triton.jit
def moe_route(logits, ids, weights, counts, EXPERTS: tl.constexpr, BE: tl.constexpr, TOP: tl.constexpr,
              SLOTS: tl.constexpr, BS: tl.constexpr, SX: tl.constexpr, NORMALIZE: tl.constexpr,
              SHARED: tl.constexpr, PDL: tl.constexpr):
    """Softmax and top-k of one token, grid (T), one warp. A bf16 logit and its index make one sortable i32, so a
    round of the selection is one max; ties go to the lower expert. NaN sorts first and still names an expert."""
    t = tl.program_id(0)
    alive = t < tl.load(counts)
    begin(PDL)
    if alive:
        e = tl.arange(0, BE)
        raw = tl.load(logits + t * SX + e, mask=e < EXPERTS, other=float("-inf"))
        bits = raw.to(tl.int16, bitcast=True).to(tl.int32)
        order = tl.where(bits < 0, bits ^ 0x7FFF, bits)  # two's complement order of the floats
        key = tl.where(e < EXPERTS, order * 65536 + (65535 - e), -2147483647)
        value = raw.to(tl.float32)
        top = tl.max(value, 0)
        p = tl.where(e < EXPERTS, tl.exp(value - top), 0.0)
        slot = tl.arange(0, BS)
        chosen = tl.zeros((BS,), tl.int32)
        for j in tl.static_range(TOP):
            best = tl.max(key, 0)
            chosen = tl.where(slot == j, 65535 - (best & 0xFFFF), chosen)
            key = tl.where(key == best, -2147483648, key)
        picked = tl.load(logits + t * SX + chosen, mask=slot < TOP, other=float("-inf")).to(tl.float32)
        weight = tl.where(slot < TOP, tl.exp(picked - top), 0.0)
        weight /= tl.sum(weight, 0) if NORMALIZE else tl.sum(p, 0)
        if SHARED:
            gate = tl.load(logits + t * SX + EXPERTS).to(tl.float32)
            weight = tl.where(slot == TOP, tl.sigmoid(gate), weight)
            chosen = tl.where(slot == TOP, EXPERTS, chosen)
        tl.store(ids + t * SLOTS + slot, chosen, mask=slot < SLOTS)
        tl.store(weights + t * SLOTS + slot, weight, mask=slot < SLOTS)


@triton.jit
def moe_up(x, ids, w, s, h, counts, SLOTS: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
           BK: tl.constexpr, SX: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr):
    """h[pair] = silu(gate x) * up x. Grid (F/BF, SLOTS, T); w [E, 2F, H], gate above up."""
    row0, pair = tl.program_id(0) * BF, tl.program_id(2) * SLOTS + tl.program_id(1)
    f = row0 + tl.arange(0, BF)
    t = tl.program_id(2)
    begin(PDL)
    if t < tl.load(counts):
        expert = tl.load(ids + pair).to(tl.int64)
        blocks: tl.constexpr = ((2 * F + 127) // 128) * ((H + 127) // 128)
        we, se = w + expert * (2 * F * H), s
        if SCALED:
            se = s + expert * blocks
        aligned: tl.constexpr = 128 % BF == 0 and F % 128 == 0
        up = tl.where(f < F, f + F, 2 * F)
        gate_f = tl.where(f < F, f, 2 * F)
        a = tl.zeros((BF, BK), tl.float32)
        b = tl.zeros((BF, BK), tl.float32)
        for k0 in tl.static_range(0, H, BK):
            a += row_dot(we, se, x + t * SX, row0, gate_f, k0, 2 * F, H, BK, SCALED, aligned)
            b += row_dot(we, se, x + t * SX, row0 + F, up, k0, 2 * F, H, BK, SCALED, aligned)
        out = silu(tl.sum(a, 1)) * tl.sum(b, 1)
        tl.store(h + pair * F + f, out.to(tl.bfloat16), mask=f < F)


@triton.jit
def moe_down(h, ids, weights, w, s, r, y, counts, SLOTS: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
             BF: tl.constexpr, BH: tl.constexpr, SR: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
             PDL: tl.constexpr):
    """y = (r +) sum over slots of weight * down h, in the order of the slots. Grid (H/BH, T), BH divides 128;
    w [E, H, F]. The rows of all slots are asked for before the kernel in front (moe_up) has ended: the router ran
    before that one, and its results are read past the first cache, which may still hold older ones."""
    row0 = tl.program_id(0) * BH
    n, f = row0 + tl.arange(0, BH), tl.arange(0, BF)
    t = tl.program_id(1)
    alive = t < tl.load(counts)
    blocks: tl.constexpr = ((H + 127) // 128) * ((F + 127) // 128)
    rows, factors = (), ()
    for j in tl.static_range(SLOTS):
        expert = tl.load(ids + t * SLOTS + j, mask=alive, other=0, cache_modifier=".cg").to(tl.int64)
        rows = rows + (tile(w + expert * (H * F), n, 0, H, F, BF),)
        factor = tl.load(weights + t * SLOTS + j, mask=alive, other=0.0, cache_modifier=".cg")
        if SCALED:
            factors = factors + (factor * scales(s + expert * blocks, row0, 0, F, BF),)
        else:
            factors = factors + (factor,)
    begin(PDL)
    if alive:
        acc, inner = tl.zeros((BH, BF), tl.float32), ()
        for j in tl.static_range(SLOTS):
            inner = inner + (tl.load(h + (t * SLOTS + j) * F + f, mask=f < F, other=0.0),)
        for j in tl.static_range(SLOTS):
            acc += to_f32(rows[j]) * (inner[j].to(tl.float32) * factors[j])[None, :]
        out = tl.sum(acc, 1)
        if ADD:
            out = out.to(tl.bfloat16).to(tl.float32) + tl.load(r + t * SR + n, mask=n < H, other=0.0).to(tl.float32)
        tl.store(y + t * H + n, out.to(tl.bfloat16), mask=n < H)


@triton.jit
def moe_count(ids, found, counts, SLOTS: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr):
    """found[e] = how many pairs chose expert e. Grid (E)."""
    e = tl.program_id(0)
    begin(PDL)
    pairs = tl.load(counts) * SLOTS
    total = tl.zeros((BP,), tl.int32)
    for p0 in range(0, pairs, BP):
        p = p0 + tl.arange(0, BP)
        total += (tl.load(ids + p, mask=p < pairs, other=-1) == e).to(tl.int32)
    tl.store(found + e, tl.sum(total, 0))


@triton.jit
def moe_place(ids, found, order, owner, counts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, BE: tl.constexpr,
              TILE: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr):
    """Pairs sorted by expert, each expert's list filled up to whole tiles with -1; owner[tile] is its expert.
    Grid (E)."""
    e = tl.program_id(0)
    begin(PDL)
    pairs = tl.load(counts) * SLOTS
    i = tl.arange(0, BE)
    tiles = (tl.load(found + i, mask=i < EXPERTS, other=0) + TILE - 1) // TILE
    first = tl.sum(tl.where(i < e, tiles, 0), 0)
    own = tl.sum(tl.where(i == e, tiles, 0), 0)
    at = first * TILE
    for p0 in range(0, pairs, BP):
        p = p0 + tl.arange(0, BP)
        mine = tl.load(ids + p, mask=p < pairs, other=-1) == e
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + at + rank, p, mask=mine)
        at += tl.sum(mine.to(tl.int32), 0)
    fill = at + tl.arange(0, TILE)
    tl.store(order + fill, -1 + tl.zeros((TILE,), tl.int32), mask=fill < (first + own) * TILE)
    for number in range(first, first + own):
        tl.store(owner + number, e)


@triton.jit
def used_tiles(found, EXPERTS: tl.constexpr, BE: tl.constexpr, TILE: tl.constexpr):
    """How many tiles moe_place made."""
    i = tl.arange(0, BE)
    return tl.sum((tl.load(found + i, mask=i < EXPERTS, other=0) + TILE - 1) // TILE, 0)


@triton.jit
def moe_up_tiles(x, order, owner, found, w, s, h, counts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr,
                 BE: tl.constexpr, H: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, TILE: tl.constexpr,
                 BK: tl.constexpr, SX: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr):
    """moe_up for TILE pairs of one expert. Grid (tiles, F/BF)."""
    number, row0 = tl.program_id(0), tl.program_id(1) * BF
    f = row0 + tl.arange(0, BF)
    begin(PDL)
    if number < used_tiles(found, EXPERTS, BE, TILE):
        expert = tl.load(owner + number).to(tl.int64)
        pair = tl.load(order + number * TILE + tl.arange(0, TILE))
        token = tl.where(pair >= 0, pair // SLOTS, 0)
        blocks: tl.constexpr = ((2 * F + 127) // 128) * ((H + 127) // 128)
        we, se = w + expert * (2 * F * H), s
        if SCALED:
            se = s + expert * blocks
        aligned: tl.constexpr = 128 % BF == 0 and F % 128 == 0
        a = tl.zeros((BF, TILE), tl.float32)
        b = tl.zeros((BF, TILE), tl.float32)
        for k0 in range(0, H, BK):
            k = k0 + tl.arange(0, BK)
            xs = tl.load(x + token[None, :] * SX + k[:, None], mask=(pair >= 0)[None, :] & (k < H)[:, None], other=0.0)
            inside = (f < F)[:, None] & (k < H)[None, :]
            gate = tl.load(we + f[:, None] * H + k[None, :], mask=inside, other=0.0)
            a = tile_dot(a, gate, xs, se, row0, f, k0, F, H, SCALED, aligned)
            up = tl.load(we + (f + F)[:, None] * H + k[None, :], mask=inside, other=0.0)
            b = tile_dot(b, up, xs, se, row0 + F, f + F, k0, 2 * F, H, SCALED, aligned)
        out = silu(a) * b
        tl.store(h + pair[None, :] * F + f[:, None], out.to(tl.bfloat16),
                 mask=(pair >= 0)[None, :] & (f < F)[:, None])


@triton.jit
def moe_down_tiles(h, order, owner, found, w, s, o, counts, EXPERTS: tl.constexpr, BE: tl.constexpr,
                   H: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr,
                   SCALED: tl.constexpr, PDL: tl.constexpr):
    """o[pair] = down h[pair] for TILE pairs of one expert. Grid (tiles, H/BH)."""
    number, row0 = tl.program_id(0), tl.program_id(1) * BH
    n = row0 + tl.arange(0, BH)
    begin(PDL)
    if number < used_tiles(found, EXPERTS, BE, TILE):
        expert = tl.load(owner + number).to(tl.int64)
        pair = tl.load(order + number * TILE + tl.arange(0, TILE))
        blocks: tl.constexpr = ((H + 127) // 128) * ((F + 127) // 128)
        we, se = w + expert * (H * F), s
        if SCALED:
            se = s + expert * blocks
        acc = tl.zeros((BH, TILE), tl.float32)
        for k0 in range(0, F, BK):
            k = k0 + tl.arange(0, BK)
            xs = tl.load(h + pair[None, :] * F + k[:, None], mask=(pair >= 0)[None, :] & (k < F)[:, None], other=0.0)
            weights = tl.load(we + n[:, None] * F + k[None, :], mask=(n < H)[:, None] & (k < F)[None, :], other=0.0)
            acc = tile_dot(acc, weights, xs, se, row0, n, k0, H, F, SCALED, 128 % BH == 0)
        tl.store(o + pair[None, :] * H + n[:, None], acc.to(tl.bfloat16),
                 mask=(pair >= 0)[None, :] & (n < H)[:, None])


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
