"""Matrix products of many tokens, y = x w^T (+ r), on tensor cores. Weights row-major [N, K], bf16 or e4m3 with one f32
scale per 128 x 128 block. With NARROW the activations are e4m3 too, one f32 scale per token and 128 columns, and both
scales are applied to the f32 sums after every 128 columns; else e4m3 weights are widened to bf16."""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, narrowed, to_f32, true_rows


@triton.jit
def quantize_rows(x, q, qs, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
                  BR: tl.constexpr, SX: tl.constexpr, PDL: tl.constexpr):
    """q = x in e4m3 [rows, K], qs its scales [rows, K/128]. Grid (rows/BR, K/BK); BK is 128 or a multiple."""
    t, k = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BK + tl.arange(0, BK)
    begin(PDL)
    rows = true_rows(counts, ROWS, TIMES)
    if tl.program_id(0) * BR < rows:
        inside = (t < rows)[:, None] & (k < K)[None, :]
        v = tl.load(x + t[:, None] * SX + k[None, :], mask=inside, other=0.0).to(tl.float32)
        codes, scale = narrowed(v, BR, BK, 128)
        tl.store(q + t[:, None] * K + k[None, :], codes, mask=inside)
        block = tl.program_id(1) * (BK // 128) + tl.arange(0, BK // 128)
        there = (t < rows)[:, None] & (block * 128 < K)[None, :]
        tl.store(qs + t[:, None] * ((K + 127) // 128) + block[None, :], scale, mask=there)


@triton.jit
def weight_scale(s, row0, n, k0, K: tl.constexpr, ALIGNED: tl.constexpr):
    """The scale of rows n and columns from k0: one number when all rows share a block, else one for each row."""
    if ALIGNED:
        return tl.load(s + (row0 // 128) * ((K + 127) // 128) + k0 // 128)
    else:
        return tl.load(s + (n // 128) * ((K + 127) // 128) + k0 // 128)


@triton.jit
def tile_sum(acc, xs, ws, x_scale, w_scale, NARROW: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr,
             SWAP: tl.constexpr):
    """acc + x w^T of tiles xs [BT, BK], ws [BN, BK]: [BT, BN], or [BN, BT] with SWAP (few tokens: weights fill the
    rows of the tensor core)."""
    if not NARROW:
        ws = to_f32(ws).to(tl.bfloat16) if SCALED else ws
    if SWAP:
        a, b = ws, tl.trans(xs)
    else:
        a, b = xs, tl.trans(ws)
    if not SCALED:
        return tl.dot(a, b, acc)
    part = tl.dot(a, b)
    if NARROW and ALIGNED:
        factor = x_scale * w_scale
        return acc + part * (factor[None, :] if SWAP else factor[:, None])
    if NARROW:
        part *= x_scale[None, :] if SWAP else x_scale[:, None]
    if ALIGNED:
        return acc + part * w_scale
    else:
        return acc + part * (w_scale[:, None] if SWAP else w_scale[None, :])


@triton.jit
def columns(base, k0, K: tl.constexpr, BK: tl.constexpr):
    """A tile of rows at `base` [B, 1], columns k0 to k0 + BK; masks only where K ends within a tile."""
    k = (k0 + tl.arange(0, BK))[None, :]
    if K % BK == 0:
        return tl.load(base + k)
    else:
        return tl.load(base + k, mask=k < K, other=0.0)


@triton.jit
def gemm(x, xs, w, s, r, y, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
         BT: tl.constexpr, BN: tl.constexpr, SIDE: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
         SX: tl.constexpr, SR: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
         NARROW: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr):
    """BT tokens, SIDE tiles of BN columns a program; grid (T/BT * N/(SIDE BN)): GROUP token tiles walk the
    columns together, so that what is in flight shares rows of both operands in the second cache."""
    across: tl.constexpr = (N + SIDE * BN - 1) // (SIDE * BN)
    pid = tl.program_id(0)
    begin(PDL)
    rows = true_rows(counts, ROWS, TIMES)
    group = pid // (GROUP * across)
    height = tl.minimum(tl.cdiv(rows, BT) - group * GROUP, GROUP)
    if height > 0:
        inner = pid % (GROUP * across)
        tile_t, tile_n = group * GROUP + inner % height, inner // height
        if tile_n < across:
            t, row0 = tile_t * BT + tl.arange(0, BT), tile_n * (SIDE * BN)
            x_rows = x + tl.minimum(t, rows - 1)[:, None] * SX
            aligned: tl.constexpr = 128 % BN == 0
            w_rows = ()
            for i in tl.static_range(SIDE):
                w_rows = w_rows + (w + tl.minimum(row0 + i * BN + tl.arange(0, BN), N - 1)[:, None] * K,)
            acc = ()
            for _ in tl.static_range(SIDE):
                acc = acc + (tl.zeros((BN, BT) if SWAP else (BT, BN), tl.float32),)
            for k0 in range(0, K, BK):
                x_scale, w_scale = 1.0, 1.0
                if NARROW:
                    x_scale = tl.load(xs + tl.minimum(t, rows - 1) * ((K + 127) // 128) + k0 // 128)
                v, more = columns(x_rows, k0, K, BK), ()
                for i in tl.static_range(SIDE):
                    if SCALED:
                        first = tl.minimum(row0 + i * BN, N - 1)
                        n = tl.minimum(row0 + i * BN + tl.arange(0, BN), N - 1)
                        w_scale = weight_scale(s, first, n, k0, K, aligned)
                    more = more + (tile_sum(acc[i], v, columns(w_rows[i], k0, K, BK), x_scale, w_scale, NARROW, SCALED,
                                            aligned, SWAP),)
                acc = more
            for i in tl.static_range(SIDE):
                n = row0 + i * BN + tl.arange(0, BN)
                out = tl.trans(acc[i]) if SWAP else acc[i]
                inside = (t < rows)[:, None] & (n < N)[None, :]
                if BIAS:
                    out += tl.load(r + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
                if ADD:
                    addend = tl.load(r + t[:, None] * SR + n[None, :], mask=inside, other=0.0)
                    out = out.to(tl.bfloat16).to(tl.float32) + addend.to(tl.float32)
                tl.store(y + t[:, None] * N + n[None, :], out.to(tl.bfloat16), mask=inside)


@triton.jit
def gemm_few(x, xs, w, s, r, y, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
             BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, SX: tl.constexpr,
             SR: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, NARROW: tl.constexpr,
             PDL: tl.constexpr):
    """At most BT tokens, BN columns a program, grid (N/BN): PARTS stretches of K side by side, so that most of a
    program's weights are on their way at once. PARTS * BK divides K, BK is 128 where there are scales."""
    row0, span = tl.program_id(0) * BN, K // PARTS
    n, t, part = row0 + tl.arange(0, BN), tl.arange(0, BT), tl.arange(0, PARTS)
    begin(PDL)
    rows = true_rows(counts, ROWS, TIMES)
    x_rows = x + tl.minimum(t, rows - 1)[None, :, None] * SX
    w_rows = w + tl.minimum(n, N - 1)[None, :, None] * K
    acc = tl.zeros((PARTS, BT, BN), tl.float32)
    for k0 in range(0, span, BK):
        k = part[:, None, None] * span + k0 + tl.arange(0, BK)[None, None, :]
        ws, v = tl.load(w_rows + k), tl.load(x_rows + k)
        block = (part * span + k0) // 128
        if NARROW:
            scale = tl.load(xs + tl.minimum(t, rows - 1)[None, :] * (K // 128) + block[:, None])
            scale *= tl.load(s + (row0 // 128) * (K // 128) + block)[:, None]
            acc += tl.dot(v, tl.permute(ws, (0, 2, 1))) * scale[:, :, None]
        elif SCALED:
            product = tl.dot(v, tl.permute(to_f32(ws).to(tl.bfloat16), (0, 2, 1)))
            acc += product * tl.load(s + (row0 // 128) * (K // 128) + block)[:, None, None]
        else:
            acc = tl.dot(v, tl.permute(ws, (0, 2, 1)), acc)
    out = tl.sum(acc, 0)
    inside = (t < rows)[:, None] & (n < N)[None, :]
    if ADD:
        addend = tl.load(r + t[:, None] * SR + n[None, :], mask=inside, other=0.0)
        out = out.to(tl.bfloat16).to(tl.float32) + addend.to(tl.float32)
    tl.store(y + t[:, None] * N + n[None, :], out.to(tl.bfloat16), mask=inside)
