"""Lowering of DeltaNet for more tokens than a step's kernels take: convolution, chunks, scan, gated norm."""

from __future__ import annotations

from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.triton.lowering.site import (
    COUNTS,
    MOVES,
    SPANS,
    TOKEN_SEQ,
    Site,
    call,
    cdiv,
    inner,
    result_kind,
    results,
    scratch,
    state,
)

CHUNK = 64  # tokens of a chunk: one tile of the tensor cores
SPLIT = 32  # value columns of a program that walks a sequence: 32 heads of 128 columns make 128 programs


def chunked(site: Site, sizes: dict[str, Param], conv: dict[str, Param], gates: dict[str, Param],
            weights: Ref) -> list[Call]:
    """`sizes` HK, HV, DK, DV; `conv` TAPS, RING, SX; `gates` SB, SA; `weights` the taps."""
    hk, hv, dk, dv = (int(sizes[name]) for name in ("HK", "HV", "DK", "DV"))
    tokens, channels = site.capacity(site.operand(0).type.shape), inner(site.operand(0).type.shape)
    chunks = cdiv(tokens, CHUNK)
    mixed, norms = scratch("mixed", tokens * 2 * hk * dk, "bf16"), scratch("norms", chunks * 2 * hk * CHUNK, "f32")
    w, u = scratch("w", tokens * hv * dk, "bf16"), scratch("u", tokens * hv * dv, "bf16")
    p, fade = scratch("p", chunks * hv * CHUNK * CHUNK, "bf16"), scratch("fade", chunks * hv * CHUNK, "f32")
    o = scratch("o", tokens * hv * dv, "bf16")
    column, rows = min(dv, SPLIT), 16
    return [
        call("delta_mix", [site.ref(0), weights, state("conv"), mixed, norms, TOKEN_SEQ, *SPANS],
             (cdiv(tokens, 32), 2 * hk), HK=hk, DK=dk, C=channels, BT=32, CH=CHUNK, WARPS=8, **conv),
        call("delta_solve", [site.ref(0), weights, state("conv"), mixed, norms, site.ref(2), site.ref(3), site.ref(5),
                             site.ref(6), w, u, p, fade, TOKEN_SEQ, *SPANS], (chunks, hv), CH=CHUNK,
             WARPS=4, **sizes, **conv, **gates),
        call("delta_scan", [site.ref(0), mixed, norms, w, u, p, fade, state("conv"), state("delta"), o, *MOVES],
             (hv, cdiv(dv, column), site.bucket.sequences), BV=column, CH=CHUNK, PIPE=3, ST=site.held, WARPS=4,
             **sizes, **conv),
        call("delta_norm", [o, site.ref(7), site.ref(1), *results(site), COUNTS], (cdiv(tokens * hv, rows),), HV=hv,
             DV=dv, BR=rows, SZ=site.stride(1), EPS=site.real("eps"), WARPS=4, **result_kind(site))]
