"""Attention of plans of one token: q/k norm, rope, cache append and attention over split keys in one launch.

What earlier steps left (keys and values) and all weights are read before the wait.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.attention import page_rows
from qcn_compile.targets.triton.kernels.common import begin, rounded


@triton.jit
def turned(x, partner, w, w_partner, cos, sin, d, D: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
           NORM: tl.constexpr):
    """RMS norm and rotation of heads [G, BD]; `partner` holds the element that each is turned with."""
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + EPS)
        x = rounded(x * scale * w[None, :])
        partner = rounded(partner * scale * w_partner[None, :])
    return x * cos[None, :] + tl.where((d < HALF)[None, :], -partner, partner) * sin[None, :]


@triton.jit
def attention_one(q, k, v, q_w, k_w, cos, sin, part, score, keys, values, context_lens, block_table,
                  HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr,
                  HALF: tl.constexpr, PAGE: tl.constexpr, BS: tl.constexpr, SPLITS: tl.constexpr, EPS: tl.constexpr,
                  SCALE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
                  PDL: tl.constexpr):
    """q/k norm, rope, append and attention of one token over one stretch of the keys before it. Grid (HKV, SPLITS); the
    first stretch takes the new key as well and stores it. The first BS keys are read before the wait.
    part f32 [HQ, SPLITS, D] normalised within the split, score [HQ, SPLITS] its log-sum-exp."""
    g, split = tl.program_id(0), tl.program_id(1)
    repeat: tl.constexpr = HQ // HKV
    j, d = tl.arange(0, BG), tl.arange(0, BD)
    inside = d < D
    other = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    n = tl.load(context_lens)
    stretch = tl.cdiv(tl.cdiv(n, SPLITS), BS) * BS
    low = split * stretch
    high = tl.minimum(low + stretch, n)
    rows = low + tl.arange(0, BS)
    at = page_rows(block_table, 0, 0, rows, rows < high, g, HKV, PAGE)[:, None] * D + d[None, :]
    here = (rows < high)[:, None] & inside[None, :]
    k_tile = tl.load(keys + at, mask=here, other=0.0).to(tl.bfloat16)
    v_tile = tl.load(values + at, mask=here, other=0.0).to(tl.bfloat16)
    if Q_NORM:
        q_weight, q_partner = tl.load(q_w + d, mask=inside, other=0.0), tl.load(q_w + other, mask=inside, other=0.0)
    else:
        q_weight, q_partner = d * 0.0, d * 0.0
    begin(PDL)
    rotary = d < 2 * HALF
    angle = tl.where(d < HALF, d, d - HALF)
    c, s = tl.load(cos + angle, mask=rotary, other=1.0), tl.load(sin + angle, mask=rotary, other=0.0)
    head = (g * repeat + j)[:, None]
    mine = (j < repeat)[:, None] & inside[None, :]
    raw = tl.load(q + head * D + d[None, :], mask=mine, other=0.0).to(tl.float32)
    pair = tl.load(q + head * D + other[None, :], mask=mine, other=0.0).to(tl.float32)
    qs = turned(raw, pair, q_weight, q_partner, c, s, d, D, HALF, EPS, Q_NORM).to(tl.bfloat16)
    top = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BD), tl.float32)
    for k0 in range(low, high, BS):
        if k0 > low:
            rows = k0 + tl.arange(0, BS)
            at = page_rows(block_table, 0, 0, rows, rows < high, g, HKV, PAGE)[:, None] * D + d[None, :]
            here = (rows < high)[:, None] & inside[None, :]
            k_tile = tl.load(keys + at, mask=here, other=0.0).to(tl.bfloat16)
            v_tile = tl.load(values + at, mask=here, other=0.0).to(tl.bfloat16)
        seen = (k0 + tl.arange(0, BS) < high)[None, :]
        scores = tl.where(seen, tl.dot(qs, tl.trans(k_tile)) * SCALE, float("-inf"))
        fresh = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - fresh[:, None])
        fade = tl.exp(top - fresh)
        acc = acc * fade[:, None] + tl.dot(p.to(tl.bfloat16), v_tile)
        top, total = fresh, total * fade + tl.sum(p, 1)
    if split == 0:
        k_raw = tl.load(k + g * D + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_pair = tl.load(k + g * D + other, mask=inside, other=0.0).to(tl.float32)[None, :]
        if K_NORM:
            w, w_pair = tl.load(k_w + d, mask=inside, other=0.0), tl.load(k_w + other, mask=inside, other=0.0)
        else:
            w, w_pair = d * 0.0, d * 0.0
        k_new = turned(k_raw, k_pair, w, w_pair, c, s, d, D, HALF, EPS, K_NORM).to(tl.bfloat16)
        k_new = k_new.to(keys.dtype.element_ty)
        v_new = tl.load(v + g * D + d, mask=inside, other=0.0).to(values.dtype.element_ty)
        page = tl.load(block_table + n // PAGE).to(tl.int64)
        place = ((page * HKV + g) * PAGE + n % PAGE) * D + d
        tl.store(keys + place[None, :], k_new, mask=inside[None, :])
        tl.store(values + place, v_new, mask=inside)
        one = tl.sum(qs.to(tl.float32) * k_new.to(tl.float32), 1) * SCALE
        fresh = tl.maximum(top, one)
        fade, p = tl.exp(top - fresh), tl.exp(one - fresh)
        acc = acc * fade[:, None] + rounded(p)[:, None] * v_new.to(tl.float32)[None, :]
        top, total = fresh, total * fade + p
    place = (g * repeat + j) * SPLITS + split
    tl.store(score + place, tl.where(total > 0, top + tl.log(total), float("-inf")), mask=j < repeat)
    tl.store(part + place[:, None] * D + d[None, :], acc / tl.where(total > 0, total, 1.0)[:, None], mask=mine)
