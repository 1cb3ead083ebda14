"""Mixers of plans of one token: Gated DeltaNet split over value columns, attention that appends and attends at once.

What earlier steps left (states, rings, keys and values) and all weights are read before the wait.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.attention import page_rows
from qcn_compile.targets.triton.kernels.common import begin, fetch_ahead, rounded, silu
from qcn_compile.targets.triton.kernels.rows import softplus


@triton.jit
def add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def past(ring, w, c, context, C: tl.constexpr, TAPS: tl.constexpr, RING: tl.constexpr):
    """What earlier inputs add to the convolution of the one new token."""
    acc = tl.load(w + (TAPS - 1) * C + c) * 0.0
    for j in tl.static_range(1, TAPS):
        old = tl.load(ring + ((context - j + RING) % RING) * C + c, mask=(context >= j) & (c >= 0), other=0.0)
        acc += old.to(tl.float32) * tl.load(w + (TAPS - 1 - j) * C + c)
    return acc


@triton.jit
def delta_one(x, z, b, a, conv_w, decay, dt_bias, norm_w, ring, state, y, squares, context_lens, slots, counts, ahead,
              HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
              TAPS: tl.constexpr, RING: tl.constexpr, AHEAD: tl.constexpr, FROM: tl.constexpr, LANES: tl.constexpr,
              PDL: tl.constexpr):
    """One token, BV value columns of a head: convolution, gates, L2 norms, delta rule. Grid (HV, DV / BV).

    y = o * norm_w * silu(z), not yet divided by the rms of the head; squares [HV, DV / BV] holds the parts of its
    square, which the projection behind turns into it. With S the old state and k, q before their norms, all that needs a
    sum over the keys (S^T k, S^T q, |k|, |q|, k.q) is taken at once: o = S'^T q = e S^T q + (k.q) d, S' = e S + k d^T.
    """
    h, split = tl.program_id(0), tl.program_id(1)
    repeat: tl.constexpr = HV // HK
    channels: tl.constexpr = 2 * HK * DK + HV * DV
    group = h // repeat
    ik, iv = tl.arange(0, DK), split * BV + tl.arange(0, BV)
    slot, context = tl.load(slots).to(tl.int64), tl.load(context_lens)
    at = state + (slot * HV + h) * (DK * DV) + ik[:, None] * DV + iv[None, :]
    st = tl.load(at, mask=(context > 0) & (ik[:, None] >= 0) & (iv[None, :] >= 0), other=0.0)
    own = ring + slot * (RING * channels)
    cq, ck, cv = group * DK + ik, HK * DK + group * DK + ik, 2 * HK * DK + h * DV + iv
    tap = conv_w + (TAPS - 1) * channels
    q_past, q_tap = past(own, conv_w, cq, context, channels, TAPS, RING), tl.load(tap + cq)
    k_past, k_tap = past(own, conv_w, ck, context, channels, TAPS, RING), tl.load(tap + ck)
    v_past, v_tap = past(own, conv_w, cv, context, channels, TAPS, RING), tl.load(tap + cv)
    head_decay, head_bias, norm = tl.load(decay + h), tl.load(dt_bias + h), tl.load(norm_w + iv)
    fetch_ahead(ahead, AHEAD, FROM, LANES, PDL)
    begin(PDL)
    if tl.load(counts) > 0:
        q_new, k_new, v_new = tl.load(x + cq), tl.load(x + ck), tl.load(x + cv)
        gate = silu(tl.load(z + h * DV + iv).to(tl.float32)) * norm
        fade = tl.exp(head_decay * softplus(tl.load(a + h).to(tl.float32) + head_bias))
        beta = rounded(tl.sigmoid(tl.load(b + h).to(tl.float32)))
        q = rounded(silu(rounded(q_past + q_new.to(tl.float32) * q_tap)))
        k = rounded(silu(rounded(k_past + k_new.to(tl.float32) * k_tap)))
        v = rounded(silu(rounded(v_past + v_new.to(tl.float32) * v_tap)))
        by_k, by_q = tl.reduce((st * k[:, None], st * q[:, None]), 0, add_two)
        kk, qq, kq = tl.reduce((k * k, q * q, k * q), 0, add_three)
        k_unit, q_unit = tl.rsqrt(kk + 1e-6), tl.rsqrt(qq + 1e-6) * (DK ** -0.5)
        change = (v - fade * k_unit * by_k) * beta
        out = rounded(q_unit * (fade * by_q + kq * k_unit * change))
        st = fade * st + (k * k_unit)[:, None] * change[None, :]
        tl.store(y + h * DV + iv, (out * gate).to(tl.bfloat16))
        tl.store(squares + h * (DV // BV) + split, tl.sum(out * out, 0))
        tl.store(at, st)
        row = own + (context % RING) * channels
        tl.store(row + cv, v_new)
        if (h % repeat == 0) & (split == 0):
            tl.store(row + cq, q_new)
            tl.store(row + ck, k_new)


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
def attention_one(q, k, v, q_w, k_w, cos, sin, part, score, keys, values, context_lens, block_table, counts, ahead,
                  HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr,
                  HALF: tl.constexpr, PAGE: tl.constexpr, BS: tl.constexpr, SPLITS: tl.constexpr, EPS: tl.constexpr,
                  SCALE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, AHEAD: tl.constexpr,
                  FROM: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr):
    """q/k norm, rope, append and attention of one token over one stretch of the keys before it. Grid (HKV, SPLITS); the
    first stretch takes the new key as well and stores it. The first BS keys are read before the wait.
    part f32 [HQ, SPLITS, D] normalised within the split, score [HQ, SPLITS] its log-sum-exp."""
    g, split = tl.program_id(0), tl.program_id(1)
    repeat: tl.constexpr = HQ // HKV
    j, d = tl.arange(0, BG), tl.arange(0, BD)
    inside = d < D
    other = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    n = tl.load(context_lens)
    width = tl.load(counts + 3)
    stretch = tl.cdiv(tl.cdiv(n, SPLITS), BS) * BS
    low = split * stretch
    high = tl.minimum(low + stretch, n)
    rows = low + tl.arange(0, BS)
    at = page_rows(block_table, 0, width, rows, rows < high, g, HKV, PAGE)[:, None] * D + d[None, :]
    here = (rows < high)[:, None] & inside[None, :]
    k_tile, v_tile = tl.load(keys + at, mask=here, other=0.0), tl.load(values + at, mask=here, other=0.0)
    if Q_NORM:
        q_weight, q_partner = tl.load(q_w + d, mask=inside, other=0.0), tl.load(q_w + other, mask=inside, other=0.0)
    else:
        q_weight, q_partner = d * 0.0, d * 0.0
    fetch_ahead(ahead, AHEAD, FROM, LANES, PDL)
    begin(PDL)
    if tl.load(counts) > 0:
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
                at = page_rows(block_table, 0, width, rows, rows < high, g, HKV, PAGE)[:, None] * D + d[None, :]
                here = (rows < high)[:, None] & inside[None, :]
                k_tile, v_tile = tl.load(keys + at, mask=here, other=0.0), tl.load(values + at, mask=here, other=0.0)
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
            v_new = tl.load(v + g * D + d, mask=inside, other=0.0)
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
