"""Causal attention of many tokens over KV pages [pages, HKV, PAGE, D]: online softmax, the heads of a KV head packed
with the tokens into the rows of the tensor core (Dao, "FlashAttention-2", 2023)."""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, narrowed, rounded

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def page_tile(cache, block_table, first, rows, g, d, HKV: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
              BD: tl.constexpr):
    """[rows, BD] of head g at positions `rows` of the sequence whose table starts at `first`."""
    page = tl.load(block_table + first + rows // PAGE).to(tl.int64)
    at = cache + ((page * HKV + g) * PAGE + rows % PAGE)[:, None] * D + d[None, :]
    if D == BD:
        return tl.load(at).to(tl.bfloat16)
    else:
        return tl.load(at, mask=(d < D)[None, :], other=0.0).to(tl.bfloat16)


@triton.jit
def attended(q, k, v, visible, top, total, acc, FACTOR: tl.constexpr, MASKED: tl.constexpr):
    """One tile of keys; `top` is in powers of two."""
    scores = tl.dot(q, tl.trans(k)) * FACTOR
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
        fresh = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(fresh > float("-inf"), fresh, 0.0)
    else:
        fresh = tl.maximum(top, tl.max(scores, 1))
        shift = fresh
    p = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    acc = tl.dot(p.to(tl.bfloat16), v, acc * fade[:, None])
    return fresh, total * fade + tl.sum(p, 1), acc


@triton.jit
def attention_prefill(q, gate, y, ys, keys, values, token_seq, cu, context_lens, block_table, counts, HQ: tl.constexpr,
                      HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr,
                      PAGE: tl.constexpr, BS: tl.constexpr, PIPE: tl.constexpr, SQ: tl.constexpr, SG: tl.constexpr,
                      GATE: tl.constexpr, NARROW: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr):
    """BT tokens and the BG heads of one KV head, grid (T/BT, HKV), the tiles with most keys first. A tile that spans
    sequences visits each of them; one that does not looks at the keys before its first token without masks. With NARROW
    (D a multiple of 128) y is e4m3 with scales ys [T, HQ * D / 128]."""
    g = tl.program_id(1)
    repeat: tl.constexpr = HQ // HKV
    factor: tl.constexpr = SCALE * LOG2E
    i, d, tile_s = tl.arange(0, BT * BG), tl.arange(0, BD), tl.arange(0, BS)
    begin(PDL)
    tokens = tl.load(counts)
    tile = tl.cdiv(tokens, BT) - 1 - tl.program_id(0)
    if tile >= 0:
        t, j = tile * BT + i // BG, i % BG
        mine = ((t < tokens) & (j < repeat))[:, None] & (d < D)[None, :]
        head = g * repeat + j
        qs = tl.load(q + t[:, None] * SQ + head[:, None] * D + d[None, :], mask=mine, other=0.0)
        last = tl.minimum(tile * BT + BT, tokens) - 1
        seq = tl.load(token_seq + tl.minimum(t, last))
        position = tl.load(context_lens + seq) + tl.minimum(t, last) - tl.load(cu + seq)
        width = tl.load(counts + 3)
        top = tl.full((BT * BG,), float("-inf"), tl.float32)
        total = tl.zeros((BT * BG,), tl.float32)
        acc = tl.zeros((BT * BG, BD), tl.float32)
        first_seq, last_seq = tl.load(token_seq + tile * BT), tl.load(token_seq + last)
        for s in range(first_seq, last_seq + 1):
            before = tl.load(context_lens + s) - tl.load(cu + s)
            stop = tl.minimum(tl.load(cu + s + 1), last + 1) + before
            free = tl.where(first_seq == last_seq, (tile * BT + before + 1) // BS * BS, 0)
            for k0 in tl.range(0, free, BS, num_stages=PIPE):
                k = page_tile(keys, block_table, s * width, k0 + tile_s, g, d, HKV, PAGE, D, BD)
                v = page_tile(values, block_table, s * width, k0 + tile_s, g, d, HKV, PAGE, D, BD)
                top, total, acc = attended(qs, k, v, True, top, total, acc, factor, False)
            for k0 in tl.range(free, stop, BS, num_stages=PIPE):
                rows = tl.minimum(k0 + tile_s, stop - 1)
                k = page_tile(keys, block_table, s * width, rows, g, d, HKV, PAGE, D, BD)
                v = page_tile(values, block_table, s * width, rows, g, d, HKV, PAGE, D, BD)
                visible = (seq == s)[:, None] & ((k0 + tile_s)[None, :] <= position[:, None])
                top, total, acc = attended(qs, k, v, visible, top, total, acc, factor, True)
        out = rounded(acc / tl.where(total > 0, total, 1.0)[:, None])
        place = t[:, None] * (HQ * D) + head[:, None] * D + d[None, :]
        if GATE:
            out *= tl.sigmoid(tl.load(gate + t[:, None] * SG + head[:, None] * D + d[None, :], mask=mine,
                                      other=0.0).to(tl.float32))
        if NARROW:
            codes, scale = narrowed(tl.where((d < D)[None, :], rounded(out), 0.0), BT * BG, BD, 128)
            group = tl.arange(0, BD // 128)[None, :]
            tl.store(y + place, codes, mask=mine)
            tl.store(ys + (t * HQ + head)[:, None] * (D // 128) + group, scale,
                     mask=((t < tokens) & (j < repeat))[:, None] & (group < D // 128))
        else:
            tl.store(y + place, out.to(tl.bfloat16), mask=mine)
