"""Lowering of matrix products and experts."""

from __future__ import annotations

from qcn_compile.ir.encoding import Encoding, padded, quantized
from qcn_compile.ir.types import Dim
from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.tvm.lowering.site import COUNTS, Site, call, result, scratch
from qcn_compile.targets.tvm.packing import HALF, TILE, group_count
from qcn_compile.targets.tvm.sizes import plan_ints

ZERO = {"int4": 8, "int8": 128}  # what kernels may add to codes of weights to make them unsigned


def weight_refs(site: Site, index: int, layout: str, encoding: Encoding) -> list[Ref]:
    """Codes, and their scales unless they lie among them."""
    apart = quantized(encoding) and encoding.activations == "f32"
    return [site.blob(index, layout, part) for part in (("w", "s") if apart else ("w",))]


def quantized_input(name: str, x: Ref, capacity: int, depth: int, encoding: Encoding, stride: int, threads: bool,
                    count: dict[str, Param]) -> tuple[list[Call], list[Ref]]:
    """The launch that turns x [rows, depth] into int8 (none for f32 activations), and what the product then reads."""
    if encoding.activations == "f32":
        return [], [x]
    groups = group_count(depth)
    parts = [scratch(f"{name}_q", capacity * padded(depth)), scratch(f"{name}_s", capacity * groups * 4),
             scratch(f"{name}_z", capacity * groups * 4)]
    launch = call("quantize", [x, *parts, COUNTS], **count, width=depth, stride=stride, threads=threads,
                  zero=ZERO[encoding.format])
    return [launch], parts


def linear(site: Site) -> list[Call]:
    x, encoding = site.float_type(0), site.encoding(1)
    n, k = (int(d) for d in site.operand(1).type.shape)  # type: ignore[arg-type]
    add = "" if not site.has(2) else "rows" if site.op.name == "linear_add" else "bias"
    if x.rank != 2:
        raise site.fail(f"x is {x}", "reshape it to [T, K]")
    rows = site.rows(x.shape)
    before, source = quantized_input("x", site.ref(0), site.capacity(x.shape), k, encoding, site.stride(0),
                                     not site.decode, rows)
    refs = [*source, *weight_refs(site, 1, "tiles", encoding), *([site.ref(2)] if add else []), result(), COUNTS]
    return [*before, call("linear", refs, n=n, k=k, fmt=encoding.format, act=encoding.activations, **rows,
                          stride=site.stride(0) if encoding.activations == "f32" else 0, many=not site.decode,
                          add=add, stride_r=site.stride(2) if add == "rows" else 0)]


def moe_route(site: Site) -> list[Call]:
    logits, shared = site.float_type(0), bool(site.attr("shared"))
    experts = int(logits.shape[1]) - int(shared)  # type: ignore[arg-type]
    p = scratch("p", site.capacity(logits.shape) * padded(experts, TILE) * 4)
    rows = site.rows(logits.shape)
    rows.pop("times")
    return [call("moe_route", [site.ref(0), result(0), result(1), p, COUNTS], **rows, experts=experts,
                 top_k=site.integer("top_k"), stride=site.stride(0), normalize=bool(site.attr("normalize")),
                 shared=shared, threads=not site.decode)]


def local_experts(site: Site) -> list[Call]:
    type_ = site.operand(0).type
    rows = site.rows(type_.shape)
    rows.pop("times")
    attrs = {name: site.integer(name) for name in ("first", "shared", "group", "groups")}
    args = [Ref("operand", index=0), Ref("operand", index=1), result(0), result(1), COUNTS]
    return [call("local_experts", args, **rows, slots=int(type_.shape[1]), held=site.integer("count"),  # type: ignore
                 **attrs)]


def moe(site: Site) -> list[Call]:
    """moe_experts and moe_add: sort, (quantise,) gate/up, (quantise,) down, combine."""
    if site.attr("activation") != "silu":
        raise site.fail(f"expert activation {site.attr('activation')!r}", "only silu has a kernel")
    experts, hidden, inner = (int(d) for d in site.operand(4).type.shape)  # type: ignore[arg-type]
    slots = int(site.operand(1).type.shape[1])  # type: ignore[arg-type]
    tokens = site.capacity(site.float_type(0).shape)
    rows = site.rows(site.float_type(0).shape)
    pairs, up_row, down_row = tokens * slots, padded(inner, HALF), padded(hidden, TILE)
    plan = scratch("plan", plan_ints(experts, pairs) * 4)
    h, o = scratch("h", pairs * up_row * 4), scratch("o", pairs * down_row * 4)
    ids, weights = Ref("operand", index=1), Ref("operand", index=2)
    up, down = _up(site, rows, plan, h, experts, slots), _down(site, rows, plan, h, o, experts, slots)
    add = site.op.name == "moe_add"
    combine = call("moe_combine", [o, weights, *([site.ref(5)] if add else []), result(), COUNTS], rows=rows["rows"],
                   slots=slots, hidden=hidden, add=add, stride_r=site.stride(5) if add else 0,
                   threads=not site.decode)
    sort = call("moe_sort", [ids, plan, COUNTS], rows=rows["rows"], experts=experts, slots=slots)
    return [sort, *up, *down, combine]


def _up(site: Site, rows: dict[str, Param], plan: Ref, h: Ref, experts: int, slots: int) -> list[Call]:
    encoding = site.encoding(3)
    hidden, inner = int(site.operand(4).type.shape[1]), int(site.operand(4).type.shape[2])  # type: ignore[arg-type]
    before, source = quantized_input("x", site.ref(0), _rows(site, 0), hidden, encoding, site.stride(0),
                                     not site.decode, rows)
    refs = [*source, *weight_refs(site, 3, "gate_up", encoding), plan, h]
    return [*before, call("moe_up", refs, experts=experts, slots=slots, hidden=hidden, inner=inner,
                          fmt=encoding.format, act=encoding.activations, many=not site.decode,
                          stride=site.stride(0) if encoding.activations == "f32" else 0)]


def _down(site: Site, rows: dict[str, Param], plan: Ref, h: Ref, o: Ref, experts: int, slots: int) -> list[Call]:
    encoding = site.encoding(4)
    hidden, inner = int(site.operand(4).type.shape[1]), int(site.operand(4).type.shape[2])  # type: ignore[arg-type]
    count: dict[str, Param] = {"rows": rows["rows"], "times": slots}
    before, source = quantized_input("h", h, _rows(site, 0) * slots, inner, encoding, padded(inner, HALF),
                                     not site.decode, count)
    refs = [*source, *weight_refs(site, 4, "tiles", encoding), plan, o]
    return [*before, call("moe_down", refs, experts=experts, hidden=hidden, inner=inner, fmt=encoding.format,
                          act=encoding.activations, many=not site.decode)]


def _rows(site: Site, index: int) -> int:
    shape: tuple[Dim, ...] = site.operand(index).type.shape
    return site.capacity(shape)
