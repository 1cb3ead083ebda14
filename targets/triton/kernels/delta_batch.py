"""Gated DeltaNet for batches of short steps: a program owns the value heads that share a key head, of one sequence."""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, rounded, silu
from qcn_compile.targets.triton.kernels.delta import conv_silu, keep_inputs, step


@triton.jit
def delta_batch(x, z, b, a, conv_w, decay, dt_bias, norm_w, ring, state, y, cu, context_lens, slots, into, counts,
                HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, TAPS: tl.constexpr,
                RING: tl.constexpr, SX: tl.constexpr, SZ: tl.constexpr, SB: tl.constexpr, SA: tl.constexpr,
                EPS: tl.constexpr, PDL: tl.constexpr):
    """The whole mixer, token by token, as `delta_step` does. Grid (HK, S). Nobody else reads the channels of the ring
    that a program writes, so steps of any length are safe."""
    group, s = tl.program_id(0), tl.program_id(1)
    repeat: tl.constexpr = HV // HK
    channels: tl.constexpr = 2 * HK * DK + HV * DV
    ik, iv = tl.arange(0, DK), tl.arange(0, DV)
    alive = s < tl.load(counts + 1)
    slot = tl.load(slots + s, mask=alive, other=0).to(tl.int64)
    moved = tl.load(into + s, mask=alive, other=0).to(tl.int64)
    context = tl.load(context_lens + s, mask=alive, other=0)
    start, stop = tl.load(cu + s, mask=alive, other=0), tl.load(cu + s + 1, mask=alive, other=0)
    own, kept = ring + slot * (RING * channels), ring + moved * (RING * channels)
    cq, ck = group * DK + ik, HK * DK + group * DK + ik
    norm = tl.load(norm_w + iv)
    begin(PDL)
    for j in tl.static_range(repeat):
        h = group * repeat + j
        cv = 2 * HK * DK + h * DV + iv
        head_decay, head_bias = tl.load(decay + h), tl.load(dt_bias + h)
        cell = h * (DK * DV) + ik[:, None] * DV + iv[None, :]
        at = state + slot * (HV * DK * DV) + cell
        st = tl.load(at, mask=alive & (context > 0) & (ik[:, None] >= 0), other=0.0).to(tl.float32)
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
        at = state + moved * (HV * DK * DV) + cell
        tl.store(at, st.to(state.dtype.element_ty), mask=alive & (ik[:, None] >= 0) & (iv[None, :] >= 0))
    tl.debug_barrier()
    keep_inputs(x, own, kept, moved != slot, cq, start, stop, context, channels, TAPS, RING, SX, ik >= 0)
    keep_inputs(x, own, kept, moved != slot, ck, start, stop, context, channels, TAPS, RING, SX, ik >= 0)
    for j in tl.static_range(repeat):
        cv = 2 * HK * DK + (group * repeat + j) * DV + iv
        keep_inputs(x, own, kept, moved != slot, cv, start, stop, context, channels, TAPS, RING, SX, iv >= 0)
