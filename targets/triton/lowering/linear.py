"""Lowering of matrix products: GEMV for one token, tensor cores for more."""

from __future__ import annotations

from qcn_compile.ir.encoding import Encoding
from qcn_compile.targets.base import Call, Param
from qcn_compile.targets.triton.lowering.gemm import gemm
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, cdiv, power, result

PROGRAMS = 108  # fewer large tiles than this leave multiprocessors idle (A100; Hopper has 132): take smaller ones


def gemv_shape(n: int, k: int, encoding: Encoding) -> dict[str, Param]:
    """Rows and columns of a program's weight tile, as measured on an H200 (tests/gpu/variants.py)."""
    block = min(power(k), 2048)
    if encoding.format == "bf16":
        return {"BN": 2 if n < 1024 else 4, "BK": block, "WARPS": max(1, block // 512)}
    if n > 65536:
        return {"BN": 8, "BK": min(block, 1024), "WARPS": max(1, min(block, 1024) // 512)}
    if k > 2048:
        return {"BN": 4, "BK": block, "WARPS": max(1, block // 512)}
    if n > 10000:
        return {"BN": 16, "BK": block, "WARPS": max(1, block // 256)}
    return {"BN": 4, "BK": block, "WARPS": max(1, block // 512)}


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
    if capacity == 1:
        shape = gemv_shape(n, k, encoding)
        return [call("gemv", args, (cdiv(n, int(shape["BN"])), 1), NORM=False, KEEP=False, EPS=0.0, **params, **shape)]
    if not site.decode:
        return gemm(site, encoding, weight, args[1 + len(weight):-1], params)
    shape = matmul_shape(capacity, n)
    return [call("matmul", args, (cdiv(n, int(shape["BN"])), cdiv(capacity, int(shape["BT"]))), **params, **shape)]


def norm_linear(site: Site) -> list[Call]:
    """norm_linear(x, norm_w, w): one token."""
    encoding, weight = site.matrix(2)
    n, k = (int(d) for d in site.operand(2).type.shape)  # type: ignore[arg-type]
    keep = bool(site.op.attrs["keep"])
    args = [site.ref(0), site.ref(1), *weight, *([result(1)] if keep else []), result(0), COUNTS]
    shape = gemv_shape(n, k, encoding)
    return [call("gemv", args, (cdiv(n, int(shape["BN"])), 1), N=n, K=k, SX=site.stride(0), SR=0, ADD=False, BIAS=False,
                 ADDEND=False, R="bf16", SCALED=encoding.format == "fp8", W=encoding.format, NORM=True, KEEP=keep,
                 EPS=site.real("eps"), **site.rows(site.activation(0).shape), **shape)]


def norm_linear_pair(site: Site) -> list[Call]:
    """norm_linear_pair(x, norm_w, w, w2): one token, w2 in bf16."""
    encoding, weight = site.matrix(2)
    _, second = site.matrix(3)
    n, k = (int(d) for d in site.operand(2).type.shape)  # type: ignore[arg-type]
    n2 = int(site.operand(3).type.shape[0])  # type: ignore[arg-type]
    shape = gemv_shape(n, k, encoding)
    return [call("gemv_pair", [site.ref(0), site.ref(1), *weight, *second, result(0), result(1), COUNTS],
                 (cdiv(n, int(shape["BN"])) + n2,), N=n, N2=n2, BN2=1, K=k, SX=site.stride(0), EPS=site.real("eps"),
                 SCALED=encoding.format == "fp8", W=encoding.format, **shape)]
