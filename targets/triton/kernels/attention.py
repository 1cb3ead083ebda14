"""Rotary tables, q/k norm + rope + cache append, attention over KV pages [pages, HKV, PAGE, D]."""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, narrowed, rounded


@triton.jit
def rope_table(positions, inv_freq, cos, sin, counts, HALF: tl.constexpr, BH: tl.constexpr, SCALING: tl.constexpr,
               FACTOR: tl.constexpr, PDL: tl.constexpr):
    """cos and sin of position * inv_freq, times SCALING, and times inv_freq[HALF] with FACTOR. Grid (T)."""
    t = tl.program_id(0)
    i = tl.arange(0, BH)
    begin(PDL)
    if t < tl.load(counts):
        angle = tl.load(positions + t).to(tl.float32) * tl.load(inv_freq + i, mask=i < HALF, other=0.0)
        scale = SCALING
        if FACTOR:
            scale = tl.load(inv_freq + HALF) * SCALING
        tl.store(cos + t * HALF + i, tl.cos(angle) * scale, mask=i < HALF)
        tl.store(sin + t * HALF + i, tl.sin(angle) * scale, mask=i < HALF)


@triton.jit
def normed_roped(x, w, cos, sin, d, D: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr):
    """One head's D numbers (lanes d): RMS norm, then the first 2*HALF turned, halves paired."""
    inside = d < D
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    v = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(v * v, 0) / D + EPS)
        v = rounded(v * scale * tl.load(w + d, mask=inside, other=0.0))
        u = rounded(u * scale * tl.load(w + partner, mask=inside, other=0.0))
    turned = d < 2 * HALF
    angle = tl.where(d < HALF, d, d - HALF)
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    return v * c + tl.where(d < HALF, -u, u) * s


@triton.jit
def rope_append(q, k, v, q_w, k_w, cos, sin, y, keys, values, token_seq, cu, context_lens, block_table, counts,
                HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr,
                PAGE: tl.constexpr, SQ: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr, EPS: tl.constexpr,
                Q_NORM: tl.constexpr, K_NORM: tl.constexpr, PDL: tl.constexpr):
    """One head of one token a program: grid (T, HQ + 2 * HKV), queries, then keys, then values."""
    t, h = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BD)
    begin(PDL)
    if t < tl.load(counts):
        s = tl.load(token_seq + t)
        position = tl.load(context_lens + s) + t - tl.load(cu + s)
        page = tl.load(block_table + s * tl.load(counts + 3) + position // PAGE).to(tl.int64)
        if h < HQ:
            out = normed_roped(q + t * SQ + h * D, q_w, cos + t * HALF, sin + t * HALF, d, D, HALF, EPS, Q_NORM)
            tl.store(y + (t * HQ + h) * D + d, out.to(tl.bfloat16), mask=d < D)
        elif h < HQ + HKV:
            at = ((page * HKV + h - HQ) * PAGE + position % PAGE) * D
            out = normed_roped(k + t * SK + (h - HQ) * D, k_w, cos + t * HALF, sin + t * HALF, d, D, HALF, EPS, K_NORM)
            tl.store(keys + at + d, rounded(out).to(keys.dtype.element_ty), mask=d < D)
        else:
            at = ((page * HKV + h - HQ - HKV) * PAGE + position % PAGE) * D
            value = tl.load(v + t * SV + (h - HQ - HKV) * D + d, mask=d < D)
            tl.store(values + at + d, value.to(values.dtype.element_ty), mask=d < D)


@triton.jit
def page_rows(block_table, s, width, rows, inside, g, HKV: tl.constexpr, PAGE: tl.constexpr):
    """Row numbers in the cache of positions `rows` of sequence s, head g."""
    page = tl.load(block_table + s * width + rows // PAGE, mask=inside, other=0).to(tl.int64)
    return (page * HKV + g) * PAGE + rows % PAGE


@triton.jit
def attend(q, keys, values, at, inside, visible, top, total, acc, scale, d, D: tl.constexpr):
    """One tile of the online softmax: keys at cache rows `at`, `visible` [M, BS]; returns (top, total, acc)."""
    both = inside[:, None] & (d < D)[None, :]
    k = tl.load(keys + at[:, None] * D + d[None, :], mask=both, other=0.0).to(tl.bfloat16)
    scores = tl.where(visible, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    fresh = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(fresh > float("-inf"), fresh, 0.0)
    p = tl.exp(scores - shift[:, None])
    fade = tl.exp(top - shift)
    v = tl.load(values + at[:, None] * D + d[None, :], mask=both, other=0.0).to(tl.bfloat16)
    acc = acc * fade[:, None] + tl.dot(p.to(tl.bfloat16), v)
    return fresh, total * fade + tl.sum(p, 1), acc


@triton.jit
def attention_split(q, part, score, keys, values, token_seq, cu, context_lens, block_table, counts, HQ: tl.constexpr,
                    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr, PAGE: tl.constexpr,
                    BS: tl.constexpr, SPLITS: tl.constexpr, SQ: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr):
    """Decode: the heads of one KV head over one stretch of the keys. Grid (T, HKV, SPLITS).
    part f32 [T, HQ, SPLITS, D] normalised within the split, score [T, HQ, SPLITS] its log-sum-exp."""
    t, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    repeat: tl.constexpr = HQ // HKV
    j, d = tl.arange(0, BG), tl.arange(0, BD)
    begin(PDL)
    if t < tl.load(counts):
        s = tl.load(token_seq + t)
        n = tl.load(context_lens + s) + t - tl.load(cu + s) + 1
        width = tl.load(counts + 3)
        head = g * repeat + j
        mine = (j < repeat)[:, None] & (d < D)[None, :]
        qs = tl.load(q + t * SQ + head[:, None] * D + d[None, :], mask=mine, other=0.0)
        stretch = tl.cdiv(tl.cdiv(n, SPLITS), BS) * BS
        low = split * stretch
        high = tl.minimum(low + stretch, n)
        top = tl.full((BG,), float("-inf"), tl.float32)
        total = tl.zeros((BG,), tl.float32)
        acc = tl.zeros((BG, BD), tl.float32)
        for k0 in range(low, high, BS):
            rows = k0 + tl.arange(0, BS)
            inside = rows < high
            at = page_rows(block_table, s, width, rows, inside, g, HKV, PAGE)
            top, total, acc = attend(qs, keys, values, at, inside, inside[None, :] & (j >= 0)[:, None], top, total,
                                     acc, SCALE, d, D)
        place = (t * HQ + head) * SPLITS + split
        tl.store(score + place, tl.where(total > 0, top + tl.log(total), float("-inf")), mask=j < repeat)
        if low < high:
            tl.store(part + place[:, None] * D + d[None, :], acc / total[:, None], mask=mine)


@triton.jit
def attention_combine(part, score, gate, y, ys, counts, HQ: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                      SPLITS: tl.constexpr, SG: tl.constexpr, GATE: tl.constexpr, NARROW: tl.constexpr,
                      PDL: tl.constexpr):
    """The splits of one head of one token as one softmax, times sigmoid(gate). Grid (T, HQ). With NARROW (D a multiple
    of 128) y is e4m3 with scales ys [T, HQ * D / 128]."""
    t, h = tl.program_id(0), tl.program_id(1)
    d, i = tl.arange(0, BD), tl.arange(0, SPLITS)
    begin(PDL)
    if t < tl.load(counts):
        place = (t * HQ + h) * SPLITS + i
        e = tl.load(score + place)
        parts = tl.load(part + place[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        share = tl.exp(e - tl.max(e, 0))
        parts = tl.where(share[:, None] > 0, parts, 0.0)  # splits without keys wrote none
        out = rounded(tl.sum(parts * share[:, None], 0) / tl.sum(share, 0))
        if GATE:
            out *= tl.sigmoid(tl.load(gate + t * SG + h * D + d, mask=d < D, other=0.0).to(tl.float32))
        if NARROW:
            codes, scale = narrowed(tl.reshape(tl.where(d < D, rounded(out), 0.0), (1, BD)), 1, BD, 128)
            group = tl.arange(0, BD // 128)
            tl.store(y + (t * HQ + h) * D + d, tl.reshape(codes, (BD,)), mask=d < D)
            tl.store(ys + (t * HQ + h) * (D // 128) + group, tl.reshape(scale, (BD // 128,)), mask=group < D // 128)
        else:
            tl.store(y + (t * HQ + h) * D + d, out.to(tl.bfloat16), mask=d < D)
