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
