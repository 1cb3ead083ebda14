"""Matrix products y = x w^T (+ r), weights row-major [N, K] in bf16 or e4m3 with one f32 scale per 128 x 128 block."""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, to_f32, true_rows


@triton.jit
def tile(w, n, k0, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """w[n, k0:k0+BK] as stored."""
    k = k0 + tl.arange(0, BK)
    return tl.load(w + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def scales(s, row0, k0, K: tl.constexpr, BK: tl.constexpr):
    """The scales [BK] of a tile whose rows share a row of blocks."""
    k = k0 + tl.arange(0, BK)
    return tl.load(s + (row0 // 128) * ((K + 127) // 128) + k // 128, mask=k < K, other=0.0)


@triton.jit
def scales_by_row(s, n, k0, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """The scales [BN, BK] of a tile of any rows."""
    k = k0 + tl.arange(0, BK)
    return tl.load(s + (n // 128)[:, None] * ((K + 127) // 128) + (k // 128)[None, :],
                   mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def row_dot(w, s, x, row0, n, k0, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
            ALIGNED: tl.constexpr):
    """w[n, k0:k0+BK] * x[k0:k0+BK] as f32 [BN, BK]; x points at the token. ALIGNED: all rows share a row of scales."""
    weights = tile(w, n, k0, N, K, BK)
    k = k0 + tl.arange(0, BK)
    v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if SCALED and ALIGNED:
        return to_f32(weights) * (v * scales(s, row0, k0, K, BK))[None, :]
    elif SCALED:
        return to_f32(weights) * v[None, :] * scales_by_row(s, n, k0, N, K, BK)
    else:
        return to_f32(weights) * v[None, :]


@triton.jit
def gemv_rows(row0, t, x, norm_w, w, s, r, normed, y, counts, ROWS: tl.constexpr, TIMES: tl.constexpr,
              N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SX: tl.constexpr,
              SR: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
              EPS: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr):
    """BN rows of the product of one token; BN divides 128. The first weights are asked for before the kernel in front
    has ended. With NORM, x goes through an RMS norm: its weight on the way in, its scale at the end; with KEEP the
    program of row 0 stores the normed x."""
    n = row0 + tl.arange(0, BN)
    first = tile(w, n, 0, N, K, BK)
    if SCALED:
        first_scales = scales(s, row0, 0, K, BK)
    if NORM:
        first_norm = tl.load(norm_w + tl.arange(0, BK), mask=tl.arange(0, BK) < K, other=0.0)
    begin(PDL)
    if t < true_rows(counts, ROWS, TIMES):
        acc = tl.zeros((BN, BK), tl.float32)
        squares = tl.zeros((BK,), tl.float32)
        for k0 in tl.static_range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            v = tl.load(x + t * SX + k, mask=k < K, other=0.0).to(tl.float32)
            if NORM:
                squares += v * v
                v *= first_norm if k0 == 0 else tl.load(norm_w + k, mask=k < K, other=0.0)
            if SCALED:
                v *= first_scales if k0 == 0 else scales(s, row0, k0, K, BK)
            acc += to_f32(first if k0 == 0 else tile(w, n, k0, N, K, BK)) * v[None, :]
        out = tl.sum(acc, 1)
        if NORM:
            scale = tl.rsqrt(tl.sum(squares, 0) / K + EPS)
            out *= scale
            if KEEP:
                for k0 in tl.static_range(0, K, BK):
                    k = k0 + tl.arange(0, BK)
                    mine = (k < K) & (row0 == 0)
                    v = tl.load(x + t * SX + k, mask=mine, other=0.0).to(tl.float32) * scale
                    v *= tl.load(norm_w + k, mask=mine, other=0.0)
                    tl.store(normed + t * K + k, v.to(tl.bfloat16), mask=mine)
        if BIAS:
            out += tl.load(r + n, mask=n < N, other=0.0).to(tl.float32)
        if ADD:
            out = out.to(tl.bfloat16).to(tl.float32) + tl.load(r + t * SR + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y + t * N + n, out.to(tl.bfloat16), mask=n < N)


@triton.jit
def gemv(x, norm_w, w, s, r, normed, y, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, N: tl.constexpr,
         K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SX: tl.constexpr, SR: tl.constexpr, ADD: tl.constexpr,
         BIAS: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr, EPS: tl.constexpr, SCALED: tl.constexpr,
         PDL: tl.constexpr):
    """One token a program: grid (N/BN, rows)."""
    gemv_rows(tl.program_id(0) * BN, tl.program_id(1), x, norm_w, w, s, r, normed, y, counts, ROWS, TIMES, N, K, BN, BK,
              SX, SR, ADD, BIAS, NORM, KEEP, EPS, SCALED, PDL)


@triton.jit
def gemv_pair(x, norm_w, w, s, w2, y, y2, counts, N: tl.constexpr, N2: tl.constexpr, K: tl.constexpr,
              BN: tl.constexpr, BN2: tl.constexpr, BK: tl.constexpr, SX: tl.constexpr, EPS: tl.constexpr,
              SCALED: tl.constexpr, PDL: tl.constexpr):
    """Two products of one normed token, the second with bf16 weights. Grid (N/BN + N2/BN2)."""
    p = tl.program_id(0)
    small: tl.constexpr = (N2 + BN2 - 1) // BN2
    if p < small:
        gemv_rows(p * BN2, 0, x, norm_w, w2, None, None, None, y2, counts, 0, 1, N2, K, BN2, BK, SX, 0, False, False,
                  True, False, EPS, False, PDL)
    else:
        gemv_rows((p - small) * BN, 0, x, norm_w, w, s, None, None, y, counts, 0, 1, N, K, BN, BK, SX, 0, False, False,
                  True, False, EPS, SCALED, PDL)


@triton.jit
def tile_dot(acc, weights, xs, s, row0, n, k0, N: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr,
             ALIGNED: tl.constexpr):
    """acc + (scales *) weights xs, [BN, BT]. A K-tile lies within one scale column."""
    if SCALED:
        part = tl.dot(to_f32(weights).to(tl.bfloat16), xs)
        blocks: tl.constexpr = (K + 127) // 128
        if ALIGNED:
            return acc + part * tl.load(s + (row0 // 128) * blocks + k0 // 128)
        else:
            return acc + part * tl.load(s + (n // 128) * blocks + k0 // 128, mask=n < N, other=0.0)[:, None]
    else:
        return tl.dot(weights.to(tl.bfloat16), xs, acc)


@triton.jit
def matmul(x, w, s, r, y, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
           BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SX: tl.constexpr, SR: tl.constexpr,
           ADD: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr):
    """BT tokens a program: grid (N/BN, rows/BT). The weights are the M side of the tensor-core product, so that few
    tokens still use full tiles."""
    row0 = tl.program_id(0) * BN
    n = row0 + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    begin(PDL)
    rows = true_rows(counts, ROWS, TIMES)
    if tl.program_id(1) * BT < rows:
        acc = tl.zeros((BN, BT), tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            weights = tl.load(w + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
            xs = tl.load(x + t[None, :] * SX + k[:, None], mask=(t < rows)[None, :] & (k < K)[:, None], other=0.0)
            acc = tile_dot(acc, weights, xs, s, row0, n, k0, N, K, SCALED, 128 % BN == 0)
        inside = (n < N)[:, None] & (t < rows)[None, :]
        if BIAS:
            acc += tl.load(r + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if ADD:
            addend = tl.load(r + t[None, :] * SR + n[:, None], mask=inside, other=0.0)
            acc = acc.to(tl.bfloat16).to(tl.float32) + addend.to(tl.float32)
        tl.store(y + t[None, :] * N + n[:, None], acc.to(tl.bfloat16), mask=inside)
