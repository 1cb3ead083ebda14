"""What every kernel shares: programmatic dependent launch, true sizes, number formats.

Launch rules (all kernels): `begin` runs in every program before anything that another kernel wrote is touched; only
weights, input arrays and state of earlier steps may be read before it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for the kernel before this one, then let the next one start its prologue."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch_ahead(data, BYTES: tl.constexpr, FROM: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr):
    """Ask for BYTES of `data`, from byte FROM on, to be brought into L2: every program of the grid for a share, LANES
    (its threads) requests each. Nobody waits; a later kernel finds its weights near."""
    if PDL and BYTES > 0:
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        program = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
        piece = ((BYTES // LANES + programs - 1) // programs + 127) // 128 * 128
        at = (program * LANES + tl.arange(0, LANES)) * piece
        size = tl.minimum(tl.maximum(BYTES - at, 0), piece)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [(data + FROM + at).to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def true_rows(counts, ROWS: tl.constexpr, TIMES: tl.constexpr):
    """Rows there really are: count number ROWS (T, S, R) times TIMES; ROWS < 0 means TIMES rows, always."""
    if ROWS < 0:
        return TIMES
    else:
        return tl.load(counts + ROWS) * TIMES


@triton.jit
def to_f32(v):
    """bf16, f32 or e4m3 -> f32. Where e4m3 is no type (sm_80) its bytes go through the fp16 of the same bits."""
    if v.dtype == tl.uint8:
        bits = v.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        return v.to(tl.float32)


@triton.jit
def rounded(v):
    """f32 -> bf16 -> f32: the value another kernel would have read back."""
    return v.to(tl.bfloat16).to(tl.float32)


@triton.jit
def silu(v):
    return v * tl.sigmoid(v)
