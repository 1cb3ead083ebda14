"""Lowering of the router and the experts: pair by pair when decoding, sorted by expert in prefill."""

from __future__ import annotations

from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.triton.lowering import four, single
from qcn_compile.targets.triton.lowering.moe_tiles import sorted_experts
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, cdiv, power, result, scratch


def route(site: Site) -> list[Call]:
    logits, shared = site.activation(0), bool(site.op.attrs["shared"])
    experts, top = int(logits.shape[1]) - int(shared), site.integer("top_k")  # type: ignore[arg-type]
    slots = top + int(shared)
    return [call("moe_route", [site.ref(0), result(0), result(1), COUNTS], (site.capacity(logits.shape),),
                 EXPERTS=experts, BE=power(experts), TOP=top, SLOTS=slots, BS=power(slots), SX=site.stride(0),
                 NORMALIZE=bool(site.op.attrs["normalize"]), SHARED=shared, WARPS=1)]


def local(site: Site) -> list[Call]:
    """The routing of one group of ranks."""
    ids = site.operand(0).type
    slots, shared = int(ids.shape[1]), site.integer("shared")  # type: ignore[arg-type]
    return [call("local_experts", [site.ref(0), site.ref(1), result(0), result(1), COUNTS], (site.capacity(ids.shape),),
                 SLOTS=slots, BS=power(slots), FIRST=site.integer("first"), HELD=site.integer("count"), SHARED=shared,
                 GROUP=site.integer("group"), GROUPS=site.integer("groups"), WARPS=1)]


def experts(site: Site) -> list[Call]:
    """moe_experts(x, ids, weights, gate_up, down) and moe_add with r after them; narrow_experts with x as two."""
    if site.op.attrs["activation"] != "silu":
        raise site.fail(f"expert activation {site.op.attrs['activation']!r}", "only silu has a kernel")
    if site.narrowing:
        return sorted_experts(site, _sizes(site, 1), _weights(site, 4), _weights(site, 5))
    site.activation(0)
    encoding = site.operand(3).encoding
    if encoding is not None and encoding.format in four.KINDS:
        return four.experts(site, _sizes(site))
    if site.bucket.tokens == 1:
        return single.experts(site)
    if site.decode:
        return _pairs(site)
    return sorted_experts(site, _sizes(site), _weights(site, 3), _weights(site, 4))


def _sizes(site: Site, extra: int = 0) -> tuple[int, int, int, int, int]:
    """(tokens, slots, experts, hidden, inner); `extra` operands before the usual ones."""
    count, hidden, inner = (int(d) for d in site.operand(4 + extra).type.shape)  # type: ignore[arg-type]
    slots = int(site.operand(1 + extra).type.shape[1])  # type: ignore[arg-type]
    return site.capacity(site.operand(0).type.shape), slots, count, hidden, inner


def _weights(site: Site, index: int) -> tuple[list[Ref], dict[str, Param]]:
    encoding, refs = site.matrix(index)
    return refs, {"W": encoding.format, "SCALED": encoding.format == "fp8"}


def _pairs(site: Site) -> list[Call]:
    tokens, slots, _, hidden, inner = _sizes(site)
    ids, weights = Ref("operand", index=1), Ref("operand", index=2)
    h = scratch("h", tokens * slots * inner, "bf16")
    (up, up_kind), (down, down_kind) = _weights(site, 3), _weights(site, 4)
    add = site.op.name == "moe_add"
    bk, bf = min(power(hidden), 2048 if up_kind["SCALED"] else 1024), power(inner)
    rows_up, rows_down = 4, 8  # measured on an H200 (tests/gpu/variants.py), like the warps
    return [
        call("moe_up", [site.ref(0), ids, *up, h, COUNTS], (cdiv(inner, rows_up), slots, tokens), SLOTS=slots, H=hidden,
             F=inner, BF=rows_up, BK=bk, SX=site.stride(0), WARPS=max(1, bk // 512), **up_kind),
        call("moe_down", [h, ids, weights, *down, *([site.ref(5)] if add else []), result(), COUNTS],
             (cdiv(hidden, rows_down), tokens), SLOTS=slots, H=hidden, F=inner, BF=bf, BH=rows_down,
             SR=site.stride(5) if add else 0, ADD=add, WARPS=4, **down_kind)]
