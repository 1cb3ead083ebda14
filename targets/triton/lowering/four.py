"""Lowering of experts with weights of four bits: one token, pair by pair for few, sorted by expert for more."""

from __future__ import annotations

from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.triton.choices import Cut, varied
from qcn_compile.targets.triton.lowering.moe_tiles import sort, tile
from qcn_compile.targets.triton.lowering.single import registers, shared_expert
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, cdiv, power, result, scratch

KINDS: dict[str, dict[str, Param]] = {"nvfp4": {"G": 16, "S": "fp8", "WHOLE": True},
                                      "int4-g128": {"G": 128, "S": "f16", "WHOLE": False}}
LANE = 4  # words of eight codes that a lane of the one-token kernels takes of a row, at most those that share a scale


def experts(site: Site, shape: tuple[int, int, int, int, int]) -> list[Call]:
    """moe_experts(x, ids, weights, gate_up, down) and moe_add with r after them. `shape`: tokens, slots, experts,
    hidden, inner."""
    tokens, slots, count, hidden, inner = shape
    encoding = site.operand(3).encoding
    assert encoding is not None
    kind = KINDS[encoding.format]
    ids, weights = Ref("operand", index=1), Ref("operand", index=2)
    add = site.has(5)
    rest = [site.ref(5)] if add else []
    addend: dict[str, Param] = {"SR": site.stride(5) if add else 0, "ADD": add}
    sizes: dict[str, Param] = {"H": hidden, "F": inner, **kind}
    up, down = site.four(3), site.four(4)
    if site.bucket.tokens == 1 and hidden % 2 == inner % 2 == 0:
        h = scratch("h", slots * inner, "bf16")
        return _one(site, slots, [site.ref(0), ids, *up, h], [h, ids, weights, *down, *rest, result()], add, sizes)
    if site.decode:
        h = scratch("h", tokens * slots * inner, "bf16")
        return [call("four_up", [site.ref(0), ids, *up, h, COUNTS], (cdiv(inner, 4), slots, tokens), SLOTS=slots,
                     BF=4, BK=min(power(hidden, 16), 1024), SX=site.stride(0), WARPS=4, **sizes),
                call("four_down", [h, ids, weights, *down, *rest, result(), COUNTS], (cdiv(hidden, 8), tokens),
                     SLOTS=slots, BF=power(inner, 16), BH=8, WARPS=4, **sizes, **addend)]
    pairs = tokens * slots
    size, block = tile(pairs, count), min(128, power(inner, 16))
    before, made, most = sort(ids, pairs, slots, count, size)
    h, o = scratch("h", most * size * inner, "bf16"), scratch("o", pairs * hidden, "bf16")
    tiled, few = list(made.values()), size <= 32
    shared: dict[str, Param] = {"EXPERTS": count, "TILE": size, "SWAP": few, "BK": 64, "WARPS": 4 if few else 8,
                                "STAGES": 3, **sizes}
    return [*before,
            call("four_up_tiles", [site.ref(0), *tiled, *up, h, COUNTS], (most * cdiv(inner, block),), SLOTS=slots,
                 BF=block, SX=site.stride(0), **shared),
            call("four_down_tiles", [h, *tiled, *down, o, COUNTS], (most * cdiv(hidden, 128),), BH=128, **shared),
            call("moe_combine", [o, weights, *rest, result(), COUNTS], (tokens, cdiv(hidden, 1024)), SLOTS=slots,
                 H=hidden, BH=min(1024, power(hidden)), **addend)]


def _one(site: Site, slots: int, above: list[Ref], below: list[Ref], add: bool, sizes: dict[str, Param]) -> list[Call]:
    """The launches of one token; `above`, `below` their arguments."""
    most = int(sizes["G"]) // 8
    hidden, inner = int(sizes["H"]), int(sizes["F"])

    def up(cut: Cut) -> Call:
        lanes, rows = _lanes(cut, most)
        return call("four_up_one", above, (cdiv(inner, int(rows["RG"]) * cut["RW"]), slots), **lanes, **rows, **sizes,
                    SLOTS=slots, SHARED=shared_expert(site), INT4=not sizes["WHOLE"])

    def down(cut: Cut) -> Call:
        lanes, rows = _lanes(cut, most)
        return call("four_down_one", below, (cdiv(hidden, cut["RW"]),), SLOTS=slots, ADD=add, **lanes, **rows, **sizes,
                    INT4=not sizes["WHOLE"])

    return [varied(site.cuts, "up4", up), varied(site.cuts, "down4", down)]


def _lanes(cut: Cut, most: int) -> tuple[dict[str, Param], dict[str, Param]]:
    """Lanes and their words, groups of rows and the rest; `most`: words that share a scale."""
    size = min(LANE, most)
    lanes = cut["L"] * LANE // size
    return {"L": lanes, "C": size}, {"RG": 32 * cut["WARPS"] // lanes, "RW": cut["RW"], "WARPS": cut["WARPS"],
                                        **registers(cut)}
