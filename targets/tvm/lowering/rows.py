"""Lowering of pointwise ops, norms, concatenation, gathers and look-ups."""

from __future__ import annotations

from qcn_compile.ir.types import DType, TensorType
from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.tvm.lowering.site import COUNTS, Site, call, inner, result


def unary(site: Site) -> list[Call]:
    x = site.float_type(0)
    value = {"value": site.real("value")} if "value" in site.op.attrs else {}
    return [call("unary", [site.ref(0), result(), COUNTS], op=site.op.name, **site.rows(x.shape), width=inner(x.shape),
                 stride=site.stride(0), threads=not site.decode, **value)]


def binary(site: Site) -> list[Call]:
    a, b, y = site.float_type(0), site.float_type(1), site.results[0]
    return [call("binary", [site.ref(0), site.ref(1), result(), COUNTS], op=site.op.name, **site.rows(y.shape),
                 width=inner(y.shape), stride_a=_stride(site, 0, y), stride_b=_stride(site, 1, y),
                 shape_a=_form(site, a, y), shape_b=_form(site, b, y), threads=not site.decode)]


def _form(site: Site, x: TensorType, y: TensorType) -> str:
    """How an operand broadcasts to the result: full, row, column or one."""
    padded = (1,) * (y.rank - x.rank) + tuple(x.shape)
    if padded == tuple(y.shape):
        return "full"
    if all(d == 1 for d in padded):
        return "one"
    if padded[0] == 1 and padded[1:] == tuple(y.shape[1:]):
        return "row"
    if padded[0] == y.shape[0] and all(d == 1 for d in padded[1:]):
        return "column"
    raise site.fail(f"{x} does not broadcast to {y} row by row", "reshape it to [W], [T, 1] or the full shape")


def _stride(site: Site, index: int, y: TensorType) -> int:
    return site.stride(index) if site.operand(index).type.rank == y.rank else 0


def rms_norm(site: Site) -> list[Call]:
    x = site.float_type(0)
    heads = inner(x.shape) // int(x.shape[-1])  # type: ignore[arg-type]
    return [call("rms_norm", [site.ref(0), site.ref(1), result(), COUNTS], **site.rows(x.shape), heads=heads,
                 width=int(x.shape[-1]), stride=site.stride(0), eps=site.real("eps"),  # type: ignore[arg-type]
                 threads=not site.decode)]


def add_rms_norm(site: Site) -> list[Call]:
    x = site.float_type(0)
    rows = site.rows(x.shape)
    if rows.pop("times") != 1 or x.rank != 2:
        raise site.fail(f"{x} is not [T, H]", "keep add and norm apart for this shape")
    return [call("add_rms_norm", [site.ref(0), site.ref(1), site.ref(2), result(0), result(1), COUNTS], **rows,
                 width=inner(x.shape), stride_x=site.stride(0), stride_r=site.stride(1), eps=site.real("eps"),
                 threads=not site.decode)]


def gated_rms_norm(site: Site) -> list[Call]:
    x = site.float_type(0)
    heads = inner(x.shape) // int(x.shape[-1])  # type: ignore[arg-type]
    return [call("gated_rms_norm", [site.ref(0), site.ref(1), site.ref(2), result(), COUNTS], **site.rows(x.shape),
                 heads=heads, width=int(x.shape[-1]), stride_x=site.stride(0),  # type: ignore[arg-type]
                 stride_z=site.stride(1), eps=site.real("eps"), threads=not site.decode)]


def concat(site: Site) -> list[Call]:
    types = [site.float_type(i) for i in range(len(site.operands))]
    if site.attr("axis") not in (1, -1) or any(t.rank != 2 for t in types):
        raise site.fail("only the last axis of 2-D operands can be joined", "reshape the operands to [T, W]")
    refs = [site.ref(i) for i in range(len(types))]
    return [call("concat", [*refs, result(), COUNTS], **site.rows(types[0].shape),
                 widths="x".join(str(t.shape[1]) for t in types),
                 strides="x".join(str(site.stride(i)) for i in range(len(types))), threads=not site.decode)]


def gather_rows(site: Site) -> list[Call]:
    x, index = site.float_type(0), _indices(site, 1)
    rows = site.rows(index.shape)
    rows.pop("times")
    return [call("gather_rows", [site.ref(0), Ref("operand", index=1), result(), COUNTS], **rows, width=inner(x.shape),
                 stride=site.stride(0))]


def embedding(site: Site) -> list[Call]:
    ids, table, form = _indices(site, 0), site.operand(1).type, site.encoding(1).format
    if form not in ("f32", "bf16"):
        raise site.fail(f"an embedding table in {form}", "encode it as f32 or bf16")
    rows = site.rows(ids.shape)
    rows.pop("times")
    vocab, width = (int(d) for d in table.shape)  # type: ignore[arg-type]
    part: dict[str, Param] = {"first": site.integer("first")} if "first" in site.op.attrs else {}
    return [call("embedding", [Ref("operand", index=0), site.blob(1, "rows"), result(), COUNTS], **rows, width=width,
                 vocab=vocab, format=form, threads=not site.decode, **part)]


def _indices(site: Site, index: int) -> TensorType:
    type_ = site.operand(index).type
    if type_.dtype is not DType.i32 or type_.rank != 1:
        raise site.fail(f"indices are {type_}", "give i32 of one axis")
    return type_
