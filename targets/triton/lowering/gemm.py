"""Lowering of matrix products of more tokens than a step's kernels take: activations to e4m3 where the card has it."""

from __future__ import annotations

from qcn_compile.ir.encoding import Encoding
from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, cdiv, power, result, scratch

CORES = 132  # multiprocessors of the cards these tiles were measured on


def few(tokens: int, n: int, k: int, narrow: bool, scaled: bool) -> dict[str, Param] | None:
    """Tile sizes where so few columns meet so few tokens that a program takes stretches of K side by side."""
    parts = 4 if scaled else 8
    if tokens > 32 or n > 4096 or k % (parts * 128):
        return None
    columns = 8 if not scaled else 16 if narrow else 32
    return {"BT": power(tokens, 16), "BN": columns, "BK": 128, "PARTS": parts, "WARPS": 4, "STAGES": 4 if scaled else 3}


def tiles(tokens: int, n: int, narrow: bool, scaled: bool) -> dict[str, Param]:
    """Tile sizes of a product [tokens, n]. Few tokens: many narrow programs, so that enough weights are on their way;
    where there are many columns anyway, weights on the rows of the tensor core."""
    one: dict[str, Param] = {"SIDE": 1, "GROUP": 1, "SWAP": False}
    if tokens <= 128 and n <= 1024 and not scaled:
        return {**one, "BT": min(power(tokens, 16), 64), "BN": 16, "BK": 256, "WARPS": 4,
                "STAGES": 4 if tokens <= 32 else 3}
    one["BK"] = 128 if narrow else 64
    if tokens <= 32 and n <= 4096:
        return {**one, "BT": power(tokens, 16), "BN": 16, "WARPS": 2 if tokens <= 16 else 4, "STAGES": 6}
    if tokens <= 64:
        return {**one, "BT": power(tokens, 16), "BN": 64, "SWAP": True, "WARPS": 4, "STAGES": 4}
    large = cdiv(n, 128) * cdiv(tokens, 128)
    if large < CORES and (tokens < 512 or not narrow):
        return {**one, "BT": 64, "BN": 64, "GROUP": 8, "WARPS": 4, "STAGES": 3}
    if narrow and tokens <= 1024:  # three programs a multiprocessor, or two that load further ahead
        many = cdiv(n, 128) * cdiv(tokens, 64) > 2 * CORES
        return {**one, "BT": 64, "BN": 128, "GROUP": 16, "WARPS": 4, "STAGES": 3 if many else 4}
    if narrow and large >= 4 * CORES:
        return {**one, "BT": 128, "BN": 128, "SIDE": 2, "GROUP": 16, "WARPS": 8, "STAGES": 3}
    return {**one, "BT": 128, "BN": 128, "GROUP": 8, "WARPS": 8, "STAGES": 3}


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
    add = site.has(3)
    params: dict[str, Param] = {
        "N": n, "K": k, "SX": site.stride(0), "SR": site.stride(3) if add else 0, "ADD": add, "BIAS": False,
        "ADDEND": add, "R": "bf16", "SCALED": True, "W": "fp8", **site.rows(site.operand(0).type.shape)}
    return product(site, [site.ref(0), site.ref(1)], [*weight, *([site.ref(3)] if add else []), result()], params, True)


def gemm(site: Site, encoding: Encoding, weight: list[Ref], rest: list[Ref], params: dict[str, Param]) -> list[Call]:
    """`weight` codes (and scales), `rest` addend or bias if any and the result, `params` what linear knows of them."""
    return product(site, [site.ref(0)], [*weight, *rest], params,
                   site.narrow and not site.decode and encoding.format == "fp8")


def product(site: Site, x: list[Ref], rest: list[Ref], params: dict[str, Param], narrow: bool) -> list[Call]:
    """Launches of a product of x, which is bf16, or codes and scales."""
    tokens, n, k = site.capacity(site.operand(0).type.shape), int(params["N"]), int(params["K"])
    before = list[Call]()
    if narrow and len(x) == 1:
        before, x = quantized(site, 0)
        params = {**params, "SX": k}
    kind: dict[str, Param] = {"X": "fp8" if narrow else "bf16", "NARROW": narrow}
    shape = None if params["BIAS"] else few(tokens, n, k, narrow, bool(params["SCALED"]))
    if shape:
        kind |= {name: value for name, value in params.items() if name != "BIAS"}
        return [*before, call("gemm_few", [*x, *rest, COUNTS], (cdiv(n, int(shape["BN"])),), **kind, **shape)]
    shape = tiles(tokens, n, narrow, bool(params["SCALED"]))
    return [*before, call("gemm", [*x, *rest, COUNTS], _grid(tokens, n, shape), **params, **kind, **shape)]


def _grid(tokens: int, n: int, shape: dict[str, Param]) -> tuple[int]:
    """Programs of a product: whole groups of token tiles."""
    group = int(shape["GROUP"])
    down = cdiv(cdiv(tokens, int(shape["BT"])), group) * group
    return (cdiv(n, int(shape["BN"]) * int(shape["SIDE"])) * down,)
