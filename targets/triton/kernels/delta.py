"""Gated DeltaNet. State [slots, HV, DK, DV] f32 or bf16; the convolution keeps its last inputs in a ring
[slots, RING, C], the input of position p at row p % RING. Slot and ring may be written elsewhere (`into`).

RING is large enough that a step of up to RING - 3 tokens writes no row that the same step reads, so programs that share
channels need no order among them; in longer ones a program owns its channels (`delta_batch`, `delta_chunk`).
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, rounded, silu
from qcn_compile.targets.triton.kernels.rows import softplus


@triton.jit
def conv_silu(x, ring, w, c, t, start, context, C: tl.constexpr, TAPS: tl.constexpr, RING: tl.constexpr,
              SX: tl.constexpr, mask):
    """silu(conv) of channels c at token t: inputs of this step from x, earlier ones from the ring, zeros before all."""
    acc = tl.load(x + t * SX + c, mask=mask, other=0.0).to(tl.float32)
    acc *= tl.load(w + (TAPS - 1) * C + c, mask=mask, other=0.0)
    for j in tl.static_range(1, TAPS):
        tap = tl.load(w + (TAPS - 1 - j) * C + c, mask=mask, other=0.0)
        fresh = t - j >= start
        position = context + t - j - start
        v = tl.load(x + (t - j) * SX + c, mask=mask & fresh, other=0.0).to(tl.float32)
        old = mask & (t - j < start) & (position >= 0)
        v += tl.load(ring + ((position + RING) % RING) * C + c, mask=old, other=0.0).to(tl.float32)
        acc += v * tap
    return rounded(silu(rounded(acc)))


@triton.jit
def keep_inputs(x, ring, into, other, c, start, stop, context, C: tl.constexpr, TAPS: tl.constexpr,
                RING: tl.constexpr, SX: tl.constexpr, mask):
    """Write the last TAPS - 1 inputs into the ring `into`: of this step, and those before it when it is an `other`."""
    for j in tl.static_range(1, TAPS):
        t = stop - j
        position = context + t - start
        row = ((position + RING) % RING) * C + c
        old = mask & (t < start) & (position >= 0) & other
        v = tl.load(x + t * SX + c, mask=mask & (t >= start), other=0.0)
        v += tl.load(ring + row, mask=old, other=0.0)
        tl.store(into + row, v, mask=(mask & (t >= start)) | old)


@triton.jit
def step(st, q, k, v, a, b, decay, dt_bias, DK: tl.constexpr):
    """One token: the new state [DK, BV] and the output [BV]. The formula of `delta_rule` in the op table."""
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * (DK ** -0.5)
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    st *= tl.exp(decay * softplus(a + dt_bias))
    change = (v - tl.sum(st * k[:, None], 0)) * rounded(tl.sigmoid(b))
    st += k[:, None] * change[None, :]
    return st, tl.sum(st * q[:, None], 0)


@triton.jit
def past(ring, w, c, context, C: tl.constexpr, TAPS: tl.constexpr, RING: tl.constexpr, mask):
    """What earlier inputs add to the convolution of the one new token."""
    acc = tl.load(w + (TAPS - 1) * C + c) * 0.0
    for j in tl.static_range(1, TAPS):
        old = tl.load(ring + ((context - j + RING) % RING) * C + c, mask=mask & (context >= j), other=0.0)
        acc += old.to(tl.float32) * tl.load(w + (TAPS - 1 - j) * C + c)
    return acc


@triton.jit
def add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def delta_one(x, z, b, a, conv_w, decay, dt_bias, norm_w, ring, state, y, context_lens, slots,
              HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, TAPS: tl.constexpr,
              RING: tl.constexpr, EPS: tl.constexpr,
              PDL: tl.constexpr):
    """The whole mixer for one token of one sequence. Grid (HV); one program owns a head. All that earlier steps left
    (state, ring) and all weights are on their way before the projection in front has ended.

    With S the old state and k, q before their norms, all that needs a sum over the keys (S^T k, S^T q, |k|, |q|, k.q)
    is taken at once: o = S'^T q = e S^T q + (k.q) d, S' = e S + k d^T.
    """
    h = tl.program_id(0)
    repeat: tl.constexpr = HV // HK
    channels: tl.constexpr = 2 * HK * DK + HV * DV
    group = h // repeat
    ik, iv, which = tl.arange(0, DK), tl.arange(0, DV), tl.arange(0, 2)[:, None]
    slot, context = tl.load(slots).to(tl.int64), tl.load(context_lens)
    at = state + (slot * HV + h) * (DK * DV) + ik[:, None] * DV + iv[None, :]
    st = tl.load(at, mask=(context > 0) & (ik[:, None] >= 0) & (iv[None, :] >= 0), other=0.0).to(tl.float32)
    own = ring + slot * (RING * channels)
    # q and k as one tensor [2, DK]: enough elements that Triton loads each once and hands them on through shared memory
    cqk, cv = which * (HK * DK) + group * DK + ik[None, :], 2 * HK * DK + h * DV + iv
    tap = conv_w + (TAPS - 1) * channels
    qk_past, qk_tap = past(own, conv_w, cqk, context, channels, TAPS, RING, cqk >= 0), tl.load(tap + cqk)
    v_past, v_tap = past(own, conv_w, cv, context, channels, TAPS, RING, iv >= 0), tl.load(tap + cv)
    head_decay, head_bias, norm = tl.load(decay + h), tl.load(dt_bias + h), tl.load(norm_w + iv)
    begin(PDL)
    qk_new, v_new = tl.load(x + cqk), tl.load(x + cv)
    gate = silu(tl.load(z + h * DV + iv).to(tl.float32)) * norm
    fade = tl.exp(head_decay * softplus(tl.load(a + h).to(tl.float32) + head_bias))
    beta = rounded(tl.sigmoid(tl.load(b + h).to(tl.float32)))
    qk = rounded(silu(rounded(qk_past + qk_new.to(tl.float32) * qk_tap)))
    v = rounded(silu(rounded(v_past + v_new.to(tl.float32) * v_tap)))
    q, k = tl.sum(tl.where(which == 0, qk, 0.0), 0), tl.sum(tl.where(which == 1, qk, 0.0), 0)
    by_k, by_q = tl.reduce((st * k[:, None], st * q[:, None]), 0, add_two)
    kk, qq, kq = tl.reduce((k * k, q * q, k * q), 0, add_three)
    k_unit, q_unit = tl.rsqrt(kk + 1e-6), tl.rsqrt(qq + 1e-6) * (DK ** -0.5)
    change = (v - fade * k_unit * by_k) * beta
    tl.store(at, (fade * st + (k * k_unit)[:, None] * change[None, :]).to(state.dtype.element_ty))
    out = rounded(q_unit * (fade * by_q + kq * k_unit * change))
    out = out * tl.rsqrt(tl.sum(out * out, 0) / DV + EPS) * gate
    tl.store(y + h * DV + iv, out.to(tl.bfloat16))
    row = own + (context % RING) * channels
    tl.store(row + cv, v_new)
    if h % repeat == 0:
        tl.store(row + cqk, qk_new)


@triton.jit
def delta_step(x, z, b, a, conv_w, decay, dt_bias, norm_w, ring, state, y, cu, context_lens, slots, into, counts,
               HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, TAPS: tl.constexpr,
               RING: tl.constexpr, SX: tl.constexpr, SZ: tl.constexpr, SB: tl.constexpr, SA: tl.constexpr,
               EPS: tl.constexpr, PDL: tl.constexpr):
    """The whole mixer for a few tokens: convolution, gates, rule, gated norm. Grid (HV, S); one program owns a head."""
    h, s = tl.program_id(0), tl.program_id(1)
    repeat: tl.constexpr = HV // HK
    channels: tl.constexpr = 2 * HK * DK + HV * DV
    group = h // repeat
    ik, iv = tl.arange(0, DK), tl.arange(0, DV)
    alive = s < tl.load(counts + 1)
    slot = tl.load(slots + s, mask=alive, other=0).to(tl.int64)
    context = tl.load(context_lens + s, mask=alive, other=0)
    start, stop = tl.load(cu + s, mask=alive, other=0), tl.load(cu + s + 1, mask=alive, other=0)
    moved = tl.load(into + s, mask=alive, other=0).to(tl.int64)
    cell = ik[:, None] * DV + iv[None, :]
    at = state + (slot * HV + h) * (DK * DV) + cell
    st = tl.load(at, mask=alive & (context > 0) & (ik[:, None] >= 0), other=0.0).to(tl.float32)
    head_decay, head_bias = tl.load(decay + h), tl.load(dt_bias + h)
    norm = tl.load(norm_w + iv)
    own, kept = ring + slot * (RING * channels), ring + moved * (RING * channels)
    cq, ck, cv = group * DK + ik, HK * DK + group * DK + ik, 2 * HK * DK + h * DV + iv
    begin(PDL)
    for t in range(start, stop):
        q = conv_silu(x, own, conv_w, cq, t, start, context, channels, TAPS, RING, SX, ik >= 0)
        k = conv_silu(x, own, conv_w, ck, t, start, context, channels, TAPS, RING, SX, ik >= 0)
        v = conv_silu(x, own, conv_w, cv, t, start, context, channels, TAPS, RING, SX, iv >= 0)
        st, out = step(st, q, k, v, tl.load(a + t * SA + h).to(tl.float32), tl.load(b + t * SB + h).to(tl.float32),
                       head_decay, head_bias, DK)
        out = rounded(out)
        gate = silu(tl.load(z + t * SZ + h * DV + iv).to(tl.float32))
        out = out * tl.rsqrt(tl.sum(out * out, 0) / DV + EPS) * norm * gate
        tl.store(y + t * (HV * DV) + h * DV + iv, out.to(tl.bfloat16))
    at = state + (moved * HV + h) * (DK * DV) + cell
    tl.store(at, st.to(state.dtype.element_ty), mask=alive & (ik[:, None] >= 0) & (iv[None, :] >= 0))
    keep_inputs(x, own, kept, moved != slot, cv, start, stop, context, channels, TAPS, RING, SX, iv >= 0)
    if h % repeat == 0:
        keep_inputs(x, own, kept, moved != slot, cq, start, stop, context, channels, TAPS, RING, SX, ik >= 0)
        keep_inputs(x, own, kept, moved != slot, ck, start, stop, context, channels, TAPS, RING, SX, ik >= 0)
