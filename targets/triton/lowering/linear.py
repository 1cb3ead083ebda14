"""Lowering of matrix products: GEMV for one token, tensor cores for more."""

from __future__ import annotations

from qcn_compile.targets.base import Call, Param
from qcn_compile.targets.triton.lowering.gemm import few, gemm
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, cdiv, result

PROGRAMS = 108  # fewer large tiles than this leave multiprocessors idle (A100; Hopper has 132): take smaller ones


def matmul_shape(tokens: int, n: int) -> dict[str, Param]:
    """Tile sizes for a product [tokens, n]; a K-tile of scaled weights must lie in one scale block."""
    if tokens <= 16:
        return {"BN": 64, "BT": 16, "BK": 128, "WARPS": 4, "STAGES": 4}
    if tokens <= 64 or cdiv(n, 128) * cdiv(tokens, 128) < PROGRAMS:
        return {"BN": 64, "BT": 64, "BK": 64, "WARPS": 4, "STAGES": 4}
    return {"BN": 128, "BT": 128, "BK": 64, "WARPS": 8, "STAGES": 3}


def linear(site: Site) -> list[Call]:
    """linear(x, w, bias?) and linear_add(x, w, r)."""
    x = site.activation(0)
    if x.rank != 2:
        raise site.fail(f"x is {x}", "reshape it to [T, K]")
    encoding, weight = site.matrix(1)
    n, k = (int(d) for d in site.operand(1).type.shape)  # type: ignore[arg-type]
    add = site.op.name == "linear_add"
    bias = site.has(2) and not add
    capacity, scaled = site.capacity(x.shape), encoding.format == "fp8"
    args = [site.ref(0), *weight, *([site.ref(2)] if add or bias else []), result(), COUNTS]
    params: dict[str, Param] = {
        "N": n, "K": k, "SX": site.stride(0), "SR": site.stride(2) if add else 0, "ADD": add, "BIAS": bias,
        "ADDEND": add or bias, "R": "f32" if bias else "bf16", "SCALED": scaled, "W": encoding.format,
        **site.rows(x.shape)}
    if not site.decode or (few(capacity, n, k, False, scaled) and not bias):
        return gemm(site, encoding, weight, args[1 + len(weight):-1], params)
    shape = matmul_shape(capacity, n)
    return [call("matmul", args, (cdiv(n, int(shape["BN"])), cdiv(capacity, int(shape["BT"]))), **params, **shape)]
