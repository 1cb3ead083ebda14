"""Gated DeltaNet over many tokens: the delta rule in chunks of CH tokens on tensor cores (WY form; Yang et al.,
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024, with decay).

Chunks lie on the flat batch, so a chunk may hold parts of several sequences: what would couple two of them is masked.
In a chunk, per value head, with G the running sum of log decays of the own sequence, b = beta, and k, q normalised:
    A = tril(b_i (k_i . k_j) exp(G_i - G_j), -1)      M = (I + A)^-1       P = tril((q_i . k_j) exp(G_i - G_j))
    U = M (b v)      W = M (b exp(G) k)               `delta_solve`, all chunks at once
    N = U - W S      o = exp(G) q S + P N             `delta_scan`, chunk after chunk
    S <- exp(G_last) S + (exp(G_last - G) k)^T N
q, k, v stay as the convolution rounded them (bf16); norms, gates, M and S are f32, operands of products bf16.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, narrowed, rounded, silu
from qcn_compile.targets.triton.kernels.delta import keep_inputs
from qcn_compile.targets.triton.kernels.rows import softplus


@triton.jit
def convolved(x, conv_w, ring, token_seq, cu, context_lens, slots, tokens, t, c, C: tl.constexpr, TAPS: tl.constexpr,
              RING: tl.constexpr, SX: tl.constexpr):
    """silu(conv) of channels c at tokens t as f32 [T, C], rounded to bf16; zeros beyond the last token."""
    inside, wide = t < tokens, (c < C)[None, :]
    s = tl.load(token_seq + t, mask=inside, other=0)
    age = t - tl.load(cu + s, mask=inside, other=0)
    last = tl.load(conv_w + (TAPS - 1) * C + c, mask=c < C, other=0.0)
    acc = tl.load(x + t[:, None] * SX + c[None, :], mask=inside[:, None] & wide, other=0.0).to(tl.float32)
    acc *= last[None, :]
    for j in tl.static_range(1, TAPS):
        tap = tl.load(conv_w + (TAPS - 1 - j) * C + c, mask=c < C, other=0.0)
        own = (inside & (age >= j))[:, None] & wide
        acc += tl.load(x + (t - j)[:, None] * SX + c[None, :], mask=own, other=0.0).to(tl.float32) * tap[None, :]
    if tl.min(tl.where(inside, age, TAPS), 0) < TAPS - 1:  # a sequence begins here: inputs of earlier steps
        context = tl.load(context_lens + s, mask=inside, other=0) + age
        row = tl.load(slots + s, mask=inside, other=0).to(tl.int64) * RING
        for j in tl.static_range(1, TAPS):
            tap = tl.load(conv_w + (TAPS - 1 - j) * C + c, mask=c < C, other=0.0)
            old = (inside & (age < j) & (context >= j))[:, None] & wide
            at = (row + (context - j + RING) % RING)[:, None] * C + c[None, :]
            acc += tl.load(ring + at, mask=old, other=0.0).to(tl.float32) * tap[None, :]
    return rounded(silu(rounded(acc)))


@triton.jit
def delta_mix(x, conv_w, ring, mixed, norms, token_seq, cu, context_lens, slots, counts, HK: tl.constexpr,
              DK: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, CH: tl.constexpr, TAPS: tl.constexpr,
              RING: tl.constexpr, SX: tl.constexpr, PDL: tl.constexpr):
    """mixed [T, 2 HK DK] = silu(conv) of q and k, and norms [T/CH, 2 HK, CH], what a head of them is multiplied with
    (q by 1/sqrt(DK) too). BT tokens of a head a program, grid (T/BT, 2 HK)."""
    head = tl.program_id(1)
    t, c = tl.program_id(0) * BT + tl.arange(0, BT), head * DK + tl.arange(0, DK)
    begin(PDL)
    tokens = tl.load(counts)
    if tl.program_id(0) * BT < tokens:
        v = convolved(x, conv_w, ring, token_seq, cu, context_lens, slots, tokens, t, c, C, TAPS, RING, SX)
        inside = t < tokens
        at = mixed + t[:, None] * (2 * HK * DK) + c[None, :]
        tl.store(at, v.to(tl.bfloat16), mask=inside[:, None] & (c < C)[None, :])
        norm = tl.rsqrt(tl.sum(v * v, 1) + 1e-6) * tl.where(head < HK, DK ** -0.5, 1.0)
        tl.store(norms + (t // CH * (2 * HK) + head) * CH + t % CH, norm, mask=inside)


@triton.jit
def joined(m, a, SIZE: tl.constexpr, CH: tl.constexpr):
    """Inverses of diagonal blocks of SIZE to those of twice the size: m - m L m, L what of `a` joins two blocks. Keys
    of length 1, beta and decays of at most 1 keep all entries small: fp16 (the mantissa of tf32) holds the operands."""
    i, j = tl.arange(0, CH)[:, None], tl.arange(0, CH)[None, :]
    low = tl.where((i // (2 * SIZE) == j // (2 * SIZE)) & (i // SIZE != j // SIZE), a, 0.0)
    narrow = m.to(tl.float16)
    return m - tl.dot(tl.dot(narrow, low.to(tl.float16)).to(tl.float16), narrow)


@triton.jit
def unit_lower_inverse(a, CH: tl.constexpr):
    """(I + a)^-1 for strictly lower a [CH, CH], CH 32 or 64. Stable however large the entries grow, unlike a product
    of powers of a."""
    i, j = tl.arange(0, CH)[:, None], tl.arange(0, CH)[None, :]
    m = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, a, 0.0)
    m = joined(m, a, 2, CH)
    m = joined(m, a, 4, CH)
    m = joined(m, a, 8, CH)
    m = joined(m, a, 16, CH)
    if CH > 32:
        m = joined(m, a, 32, CH)
    return m


@triton.jit
def delta_solve(x, conv_w, ring, mixed, norms, b, a, decay, dt_bias, w, u, p, fade, token_seq, cu, context_lens, slots,
                counts, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, CH: tl.constexpr,
                TAPS: tl.constexpr, RING: tl.constexpr, SX: tl.constexpr, SB: tl.constexpr, SA: tl.constexpr,
                PDL: tl.constexpr):
    """What of a chunk depends on no state: W [T, HV, DK], U [T, HV, DV], P [T/CH, HV, CH, CH] and
    fade = G [T/CH, HV, CH]; v is convolved here. Grid (T/CH, HV)."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    group = h // (HV // HK)
    i, ik, iv = tl.arange(0, CH), tl.arange(0, DK), tl.arange(0, DV)
    t = chunk * CH + i
    head_decay, head_bias = tl.load(decay + h), tl.load(dt_bias + h)
    begin(PDL)
    tokens = tl.load(counts)
    if chunk * CH < tokens:
        inside = t < tokens
        rows = inside[:, None]
        seq = tl.load(token_seq + t, mask=inside, other=-1)
        low = (seq[:, None] == seq[None, :]) & (i[:, None] >= i[None, :]) & rows
        step = head_decay * softplus(tl.load(a + t * SA + h, mask=inside, other=0.0).to(tl.float32) + head_bias)
        beta = rounded(tl.sigmoid(tl.load(b + t * SB + h, mask=inside, other=0.0).to(tl.float32)))
        beta = tl.where(inside, beta, 0.0)
        total = tl.sum(tl.where(low, step[None, :], 0.0), 1)
        tl.store(fade + (chunk * HV + h) * CH + i, total, mask=inside)
        decayed = tl.where(low, tl.exp(tl.where(low, total[:, None] - total[None, :], 0.0)), 0.0)
        k_norm = tl.load(norms + (chunk * (2 * HK) + HK + group) * CH + i, mask=inside, other=0.0)
        q_norm = tl.load(norms + (chunk * (2 * HK) + group) * CH + i, mask=inside, other=0.0)
        row = mixed + t[:, None] * (2 * HK * DK)
        k = tl.load(row + HK * DK + group * DK + ik[None, :], mask=rows & (ik >= 0)[None, :], other=0.0)
        q = tl.load(row + group * DK + ik[None, :], mask=rows & (ik >= 0)[None, :], other=0.0)
        decayed *= k_norm[None, :]
        scores = tl.dot(q, tl.trans(k)) * decayed * q_norm[:, None]
        tl.store(p + (chunk * HV + h) * (CH * CH) + i[:, None] * CH + i[None, :], scores.to(tl.bfloat16))
        between = tl.dot(k, tl.trans(k)) * decayed * (k_norm * beta)[:, None]
        m = unit_lower_inverse(tl.where(i[:, None] > i[None, :], between, 0.0), CH)
        v = convolved(x, conv_w, ring, token_seq, cu, context_lens, slots, tokens, t, 2 * HK * DK + h * DV + iv,
                      2 * HK * DK + HV * DV, TAPS, RING, SX)
        fresh = tl.dot((m * beta[None, :]).to(tl.bfloat16), v.to(tl.bfloat16))
        tl.store(u + (t * HV + h)[:, None] * DV + iv[None, :], fresh.to(tl.bfloat16), mask=rows & (iv >= 0)[None, :])
        known = tl.dot((m * (beta * k_norm * tl.exp(total))[None, :]).to(tl.bfloat16), k)
        tl.store(w + (t * HV + h)[:, None] * DK + ik[None, :], known.to(tl.bfloat16), mask=rows & (ik >= 0)[None, :])


@triton.jit
def delta_scan(x, mixed, norms, w, u, p, fade, ring, state, o, cu, context_lens, slots, into, counts, HK: tl.constexpr,
               HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, CH: tl.constexpr,
               TAPS: tl.constexpr, RING: tl.constexpr, SX: tl.constexpr, PIPE: tl.constexpr, PDL: tl.constexpr):
    """Chunk after chunk of one sequence, BV value columns of one head: outputs o [T, HV, DV] before the gated norm, the
    new state, and the sequence's last inputs into the ring of the convolution. Grid (HV, DV/BV, S)."""
    h, part, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    repeat: tl.constexpr = HV // HK
    channels: tl.constexpr = 2 * HK * DK + HV * DV
    group = h // repeat
    i, ik, iv = tl.arange(0, CH), tl.arange(0, DK), part * BV + tl.arange(0, BV)
    begin(PDL)
    if s < tl.load(counts + 1):
        context, slot = tl.load(context_lens + s), tl.load(slots + s).to(tl.int64)
        start, stop = tl.load(cu + s), tl.load(cu + s + 1)
        moved = tl.load(into + s).to(tl.int64)
        cell = h * (DK * DV) + ik[:, None] * DV + iv[None, :]
        at = state + slot * (HV * DK * DV) + cell
        st = tl.load(at, mask=(context > 0) & (ik[:, None] >= 0) & (iv[None, :] >= 0), other=0.0).to(tl.float32)
        for chunk in tl.range(start // CH, tl.cdiv(stop, CH), num_stages=PIPE):
            t = chunk * CH + i
            mine = (t >= start) & (t < stop)
            rows = mine[:, None]
            place = (t * HV + h)[:, None]
            ws = tl.load(w + place * DK + ik[None, :], mask=rows & (ik >= 0)[None, :], other=0.0)
            us = tl.load(u + place * DV + iv[None, :], mask=rows & (iv >= 0)[None, :], other=0.0)
            qs = tl.load(mixed + t[:, None] * (2 * HK * DK) + group * DK + ik[None, :], mask=rows & (ik >= 0)[None, :],
                         other=0.0)
            ks = tl.load(mixed + t[:, None] * (2 * HK * DK) + (HK + group) * DK + ik[None, :],
                         mask=rows & (ik >= 0)[None, :], other=0.0)
            ps = tl.load(p + (chunk * HV + h) * (CH * CH) + i[:, None] * CH + i[None, :])
            total = tl.load(fade + (chunk * HV + h) * CH + i, mask=mine, other=0.0)
            q_norm = tl.load(norms + (chunk * (2 * HK) + group) * CH + i, mask=mine, other=0.0)
            k_norm = tl.load(norms + (chunk * (2 * HK) + HK + group) * CH + i, mask=mine, other=0.0)
            whole = tl.sum(tl.where(t == tl.minimum(chunk * CH + CH, stop) - 1, total, 0.0), 0)
            narrow = st.to(tl.bfloat16)
            new = us.to(tl.float32) - tl.dot(ws, narrow)
            out = tl.dot(qs, narrow) * (q_norm * tl.exp(total))[:, None]
            out = tl.dot(ps, new.to(tl.bfloat16), out)
            st *= tl.exp(whole)
            st = tl.dot(tl.trans(ks), (new * (k_norm * tl.exp(whole - total))[:, None]).to(tl.bfloat16), st)
            tl.store(o + place * DV + iv[None, :], out.to(tl.bfloat16), mask=rows & (iv >= 0)[None, :])
        tl.store(state + moved * (HV * DK * DV) + cell, st.to(state.dtype.element_ty))
        own, kept = ring + slot * (RING * channels), ring + moved * (RING * channels)
        other = moved != slot
        cv = 2 * HK * DK + h * DV + iv
        keep_inputs(x, own, kept, other, cv, start, stop, context, channels, TAPS, RING, SX, iv >= 0)
        if (part == 0) & (h % repeat == 0):
            for side in tl.static_range(2):
                c = side * HK * DK + group * DK + ik
                keep_inputs(x, own, kept, other, c, start, stop, context, channels, TAPS, RING, SX, ik >= 0)


@triton.jit
def delta_norm(o, w, z, y, ys, counts, HV: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, SZ: tl.constexpr,
               EPS: tl.constexpr, NARROW: tl.constexpr, PDL: tl.constexpr):
    """y = norm(o) * w * silu(z), head by head: BR heads of the flat [T * HV] a program, grid (T * HV / BR). With NARROW
    (DV 128) in e4m3, and a scale a head."""
    r, d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, DV)
    weight = tl.load(w + d)
    begin(PDL)
    rows = tl.load(counts) * HV
    if tl.program_id(0) * BR < rows:
        inside = (r < rows)[:, None] & (d >= 0)[None, :]
        v = tl.load(o + r[:, None] * DV + d[None, :], mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(z + (r // HV)[:, None] * SZ + (r % HV)[:, None] * DV + d[None, :], mask=inside, other=0.0)
        v *= tl.rsqrt(tl.sum(v * v, 1) / DV + EPS)[:, None]
        v = v * weight[None, :] * silu(gate.to(tl.float32))
        if NARROW:
            codes, scale = narrowed(rounded(v), BR, DV, DV)
            tl.store(y + r[:, None] * DV + d[None, :], codes, mask=inside)
            tl.store(ys + r, tl.reshape(scale, (BR,)), mask=r < rows)
        else:
            tl.store(y + r[:, None] * DV + d[None, :], v.to(tl.bfloat16), mask=inside)
