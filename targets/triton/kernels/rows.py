"""Look-ups, norms and pointwise kernels: one program a row (and head)."""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, narrowed, rounded, silu, true_rows


@triton.jit
def token_id(ids, last, t):
    """Token t of a step: what is given, or for -1 - slot the token that was last chosen for that slot."""
    given = tl.load(ids + t)
    return tl.where(given < 0, tl.load(last + tl.where(given < 0, -1 - given, 0)), given)


@triton.jit
def embedding(ids, last, w, y, counts, VOCAB: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr):
    """y[t] = w[token t]. Grid (T). An id outside the table reads row 0."""
    t = tl.program_id(0)
    begin(PDL)
    if t < tl.load(counts):
        row = token_id(ids, last, t)
        row = tl.where((row >= 0) & (row < VOCAB), row, 0).to(tl.int64)
        d = tl.arange(0, BD)
        value = tl.load(w + row * D + d, mask=d < D)
        tl.store(y + t * D + d, value.to(tl.bfloat16), mask=d < D)


@triton.jit
def gather_rows(x, rows, y, counts, D: tl.constexpr, BD: tl.constexpr, SX: tl.constexpr, PDL: tl.constexpr):
    """y[i] = x[rows[i]]. Grid (R)."""
    i = tl.program_id(0)
    begin(PDL)
    if i < tl.load(counts + 2):
        row = tl.load(rows + i)
        d = tl.arange(0, BD)
        tl.store(y + i * D + d, tl.load(x + row * SX + d, mask=d < D), mask=d < D)


@triton.jit
def rms_norm(x, r, w, z, total, y, q, qs, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, HEADS: tl.constexpr,
             D: tl.constexpr, BD: tl.constexpr, SX: tl.constexpr, SR: tl.constexpr, SZ: tl.constexpr,
             EPS: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, NARROW: tl.constexpr, PDL: tl.constexpr):
    """y = norm(x (+ r)) * w (* silu(z)); with ADD the sum is stored too, with NARROW y in e4m3 too (q, and scales qs of
    128 columns each). Grid (rows * HEADS), D elements each."""
    p = tl.program_id(0)
    row, head = p // HEADS, p % HEADS
    d = tl.arange(0, BD)
    inside = d < D
    weight = tl.load(w + d, mask=inside, other=0.0)
    begin(PDL)
    if row < true_rows(counts, ROWS, TIMES):
        v = tl.load(x + row * SX + head * D + d, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            v += tl.load(r + row * SR + head * D + d, mask=inside, other=0.0).to(tl.float32)
            kept = v.to(tl.bfloat16)
            tl.store(total + p * D + d, kept, mask=inside)
            v = kept.to(tl.float32)
        out = v * tl.rsqrt(tl.sum(v * v, 0) / D + EPS) * weight
        if GATE:
            out *= silu(tl.load(z + row * SZ + head * D + d, mask=inside, other=0.0).to(tl.float32))
        tl.store(y + p * D + d, out.to(tl.bfloat16), mask=inside)
        if NARROW:
            codes, scale = narrowed(tl.reshape(rounded(out), (1, BD)), 1, BD, 128)
            group = tl.arange(0, BD // 128)
            tl.store(q + p * D + d, tl.reshape(codes, (BD,)), mask=inside)
            tl.store(qs + p * (D // 128) + group, tl.reshape(scale, (BD // 128,)), mask=group < D // 128)


@triton.jit
def softplus(v):
    return tl.where(v > 20.0, v, tl.log(1.0 + tl.exp(tl.minimum(v, 20.0))))


@triton.jit
def unary(x, y, counts, OP: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr,
          D: tl.constexpr, BD: tl.constexpr, SX: tl.constexpr, PDL: tl.constexpr):
    """y = OP(x), pointwise. Grid (rows)."""
    row = tl.program_id(0)
    begin(PDL)
    if row < true_rows(counts, ROWS, TIMES):
        for at in tl.static_range(0, D, BD):
            d = at + tl.arange(0, BD)
            v = tl.load(x + row * SX + d, mask=d < D, other=0.0).to(tl.float32)
            if OP == "neg":
                v = -v
            elif OP == "exp":
                v = tl.exp(v)
            elif OP == "sigmoid":
                v = tl.sigmoid(v)
            elif OP == "silu":
                v = silu(v)
            elif OP == "softplus":
                v = softplus(v)
            elif OP == "rsqrt":
                v = tl.rsqrt(v)
            elif OP == "add_scalar":
                v = v + VALUE
            elif OP == "mul_scalar":
                v = v * VALUE
            tl.store(y + row * D + d, v.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def binary(a, b, y, counts, OP: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr, D: tl.constexpr,
           BD: tl.constexpr, SA: tl.constexpr, SB: tl.constexpr, EA: tl.constexpr, EB: tl.constexpr,
           PDL: tl.constexpr):
    """y = OP(a, b). SA, SB: distance of rows (0: the same row for all); EA, EB: 1, or 0 for one value a row."""
    row = tl.program_id(0)
    begin(PDL)
    if row < true_rows(counts, ROWS, TIMES):
        for at in tl.static_range(0, D, BD):
            d = at + tl.arange(0, BD)
            u = tl.load(a + row * SA + d * EA, mask=d < D, other=0.0).to(tl.float32)
            v = tl.load(b + row * SB + d * EB, mask=d < D, other=1.0).to(tl.float32)
            if OP == "add":
                o = u + v
            elif OP == "sub":
                o = u - v
            elif OP == "mul":
                o = u * v
            elif OP == "div":
                o = u / v
            elif OP == "silu_mul":
                o = silu(u) * v
            else:
                o = u * tl.sigmoid(v)
            tl.store(y + row * D + d, o.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def copy_columns(x, y, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                 SX: tl.constexpr, SY: tl.constexpr, AT: tl.constexpr, PDL: tl.constexpr):
    """y[:, AT:AT+D] = x: one operand of a concatenation. Grid (rows)."""
    row = tl.program_id(0)
    begin(PDL)
    if row < true_rows(counts, ROWS, TIMES):
        for at in tl.static_range(0, D, BD):
            d = at + tl.arange(0, BD)
            tl.store(y + row * SY + AT + d, tl.load(x + row * SX + d, mask=d < D, other=0.0), mask=d < D)
