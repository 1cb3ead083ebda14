"""Lowering of the experts for more tokens than a step's kernels take: pairs sorted by expert into tiles."""

from __future__ import annotations

from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.triton.lowering.gemm import quantized
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, cdiv, power, result, scratch

AT_ONCE = 4096  # pairs that one program sorts
BLOCK = 1024


def tile(pairs: int, count: int) -> int:
    """Pairs of a tile: at uniform routing most experts then fill few tiles."""
    each = cdiv(pairs, count)
    return 16 if each <= 12 else 32 if each <= 24 else 64


def sort(ids: Ref, pairs: int, slots: int, count: int, size: int) -> tuple[list[Call], dict[str, Ref], int]:
    """Launches that sort pairs by expert, their results by name, and how many tiles there can be."""
    most = min(pairs, pairs // size + count)
    found, first = scratch("found", count, "i32"), scratch("first", count + 1, "i32")
    owner, order = scratch("owner", most, "i32"), scratch("order", most * size, "i32")
    rank = scratch("rank", pairs, "i32")
    made = {"order": order, "owner": owner, "found": found, "first": first}
    experts: dict[str, Param] = {"EXPERTS": count, "BE": power(count + 1)}
    if pairs <= AT_ONCE:
        return [call("moe_sort", [ids, found, rank, first, owner, order, COUNTS], (1,), SLOTS=slots, BP=power(pairs),
                     TILE=size, WARPS=8, **experts)], made, most
    grid = (cdiv(pairs, BLOCK),)
    return [call("moe_clear", [found, COUNTS], (1,), **experts),
            call("moe_rank", [ids, found, rank, COUNTS], grid, SLOTS=slots, BP=BLOCK),
            call("moe_tile", [found, first, COUNTS], (1,), TILE=size, **experts),
            call("moe_order", [ids, rank, first, owner, order, COUNTS], grid, SLOTS=slots, BP=BLOCK, TILE=size),
            ], made, most


def sorted_experts(site: Site, shape: tuple[int, int, int, int, int], up: tuple[list[Ref], dict[str, Param]],
                   down: tuple[list[Ref], dict[str, Param]]) -> list[Call]:
    """moe_experts, moe_add and narrow_experts. `shape` tokens, slots, experts, hidden, inner; `up`, `down` weights and
    their kind."""
    tokens, slots, count, hidden, inner = shape
    pairs = tokens * slots
    size = tile(pairs, count)
    extra = int(site.narrowing)  # x is two operands
    ids, weights = Ref("operand", index=1 + extra), Ref("operand", index=2 + extra)
    before, made, most = sort(ids, pairs, slots, count, size)
    narrow = site.narrow and bool(up[1]["SCALED"])
    first, x = ([], [site.ref(i) for i in range(1 + extra)]) if site.narrowing or not narrow else quantized(site, 0)
    places, block = most * size, min(128, power(inner, 16))
    h = [scratch("h", places * inner, "fp8" if narrow else "bf16")]
    if narrow:
        h.append(scratch("hs", cdiv(inner, block) * places, "f32"))
    o, tiled = scratch("o", pairs * hidden, "bf16"), list(made.values())
    add = site.has(5 + extra)
    few = size <= 32
    shared: dict[str, Param] = {"EXPERTS": count, "H": hidden, "F": inner, "TILE": size, "NARROW": narrow,
                                "SWAP": few, "X": "fp8" if narrow else "bf16"}
    return [
        *before, *first,
        call("moe_up_tiles", [*x, *tiled, *up[0], *h, COUNTS], (most * cdiv(inner, block),), SLOTS=slots, BF=block,
             BK=128 if narrow else 64, SX=hidden if narrow else site.stride(0), WARPS=4 if few else 8,
             STAGES=5 if few else 4, **shared, **up[1]),
        call("moe_down_tiles", [*h, *tiled, *down[0], o, COUNTS], (most * cdiv(hidden, 128),), BH=128,
             BK=block if narrow else 64, WARPS=4 if few else 8, STAGES=3, **shared, **down[1]),
        call("moe_combine", [o, weights, *([site.ref(5 + extra)] if add else []), result(), COUNTS],
             (tokens, cdiv(hidden, 1024)), SLOTS=slots, H=hidden, BH=min(1024, power(hidden)),
             SR=site.stride(5 + extra) if add else 0, ADD=add)]
