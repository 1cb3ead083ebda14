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
def all_asked(PDL: tl.constexpr):
    """Every load before this is on its way before anything after it: a second wait, which ends at once. Else ptxas puts
    loads off to save registers, and few bytes are in flight. What uses them must need a load after this, too."""
    if PDL:
        gdc_wait()


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


@triton.jit
def narrowed(v, BR: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """f32 [BR, BK] as e4m3 and its scales [BR, BK/GROUP]: the largest of a group becomes 448."""
    groups = tl.reshape(v, (BR, BK // GROUP, GROUP))
    most = tl.maximum(tl.max(tl.abs(groups), 2), 1e-12)
    codes = (groups * (448.0 / most)[:, :, None]).to(tl.float8e4nv)
    return tl.reshape(codes, (BR, BK)), most * (1.0 / 448.0)
