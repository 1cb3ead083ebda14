"""Lowering of matrix products of more tokens than a step's kernels take: activations to e4m3 where the card has it."""

from __future__ import annotations

from qcn_compile.ir.encoding import Encoding
from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, cdiv, power, result, scratch

CORES = 132  # multiprocessors of the cards these tiles were measured on


def tiles(tokens: int, n: int, narrow: bool) -> dict[str, Param]:
    """Tile sizes of a product [tokens, n]. Few tokens: weights on the rows of the tensor core."""
    if tokens <= 64:
        return {"BT": power(tokens, 16), "BN": 64, "BK": 128, "GROUP": 1, "SWAP": True, "WARPS": 4, "STAGES": 4}
    if cdiv(n, 128) * cdiv(tokens, 128) < CORES:
        return {"BT": 64, "BN": 64, "BK": 128, "GROUP": 8, "SWAP": False, "WARPS": 4, "STAGES": 3}
    return {"BT": 128, "BN": 128, "BK": 128 if narrow else 64, "GROUP": 8, "SWAP": False, "WARPS": 8, "STAGES": 3}


def quantized(site: Site, index: int) -> tuple[list[Call], list[Ref]]:
    """The launch that makes e4m3 of an activation, and [codes, scales]."""
    x = site.activation(index)
    tokens, k = site.capacity(x.shape), int(x.shape[-1])  # type: ignore[arg-type]
    codes, scales = scratch("q", tokens * k, "fp8"), scratch("qs", tokens * cdiv(k, 128), "f32")
    rows, wide = 4, min(power(k, 128), 2048)
    return [call("quantize_rows", [site.ref(index), codes, scales, COUNTS], (cdiv(tokens, rows), cdiv(k, wide)), K=k,
                 BK=wide, BR=rows, SX=site.stride(index), WARPS=4, **site.rows(x.shape))], [codes, scales]


def narrow_linear(site: Site) -> list[Call]:
    """narrow_linear(codes, scales, w, r?)."""
    _, weight = site.matrix(2)
    n, k = (int(d) for d in site.operand(2).type.shape)  # type: ignore[arg-type]
    tokens, add = site.capacity(site.operand(0).type.shape), site.has(3)
    shape = tiles(tokens, n, True)
    args = [site.ref(0), site.ref(1), *weight, *([site.ref(3)] if add else []), result(), COUNTS]
    return [call("gemm", args, (cdiv(n, int(shape["BN"])) * _padded(tokens, shape),), N=n, K=k, SX=site.stride(0),
                 SR=site.stride(3) if add else 0, ADD=add, BIAS=False, ADDEND=add, R="bf16", SCALED=True, W="fp8",
                 X="fp8", NARROW=True, **site.rows(site.operand(0).type.shape), **shape)]


def gemm(site: Site, encoding: Encoding, weight: list[Ref], rest: list[Ref], params: dict[str, Param]) -> list[Call]:
    """`weight` codes (and scales), `rest` addend or bias if any and the result, `params` what linear knows of them."""
    tokens, n, k = site.capacity(site.operand(0).type.shape), int(params["N"]), int(params["K"])
    narrow = site.narrow and encoding.format == "fp8"
    before, x = quantized(site, 0) if narrow else ([], [site.ref(0)])
    shape = tiles(tokens, n, narrow)
    if not narrow:
        shape["BK"] = 64
    stride = k if narrow else params["SX"]
    return [*before, call("gemm", [*x, *weight, *rest, COUNTS], (cdiv(n, int(shape["BN"])) * _padded(tokens, shape),),
                          **{**params, "SX": stride}, X="fp8" if narrow else "bf16", NARROW=narrow, **shape)]


def _padded(tokens: int, shape: dict[str, Param]) -> int:
    """Token tiles of the grid: whole groups."""
    group = int(shape["GROUP"])
    return cdiv(cdiv(tokens, int(shape["BT"])), group) * group
