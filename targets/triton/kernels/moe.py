"""Router and experts. A pair is (token, slot), numbered token * SLOTS + slot; its expert is ids[pair]."""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, silu, to_f32
from qcn_compile.targets.triton.kernels.linear import row_dot, scales, tile


@triton.jit
def moe_route(logits, ids, weights, counts, EXPERTS: tl.constexpr, BE: tl.constexpr, TOP: tl.constexpr,
              SLOTS: tl.constexpr, BS: tl.constexpr, SX: tl.constexpr, NORMALIZE: tl.constexpr,
              SHARED: tl.constexpr, PDL: tl.constexpr):
    """Softmax and top-k of one token, grid (T), one warp. A bf16 logit and its index make one sortable i32, so a
    round of the selection is one max; ties go to the lower expert. NaN sorts first and still names an expert."""
    t = tl.program_id(0)
    begin(PDL)
    if t < tl.load(counts):
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
