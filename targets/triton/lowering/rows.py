"""Lowering of pointwise ops, norms, concatenation, gathers and look-ups."""

from __future__ import annotations

from qcn_compile.ir.types import DType, TensorType
from qcn_compile.targets.base import Call, Ref
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, inner, power, result

BLOCK = 1024


def dtype_of(site: Site, type_: TensorType) -> str:
    if type_.dtype not in (DType.bf16, DType.f32):
        raise site.fail(f"an operand is {type_}", "GPU kernels compute on bf16 and f32")
    return type_.dtype.value


def _warps(width: int) -> int:
    return 8 if width > 2048 else 4 if width > 256 else 1


def unary(site: Site) -> list[Call]:
    x, y = site.operand(0).type, site.results[0]
    if site.op.name == "cast":
        return binary(site)
    width = inner(x.shape)
    return [call("unary", [site.ref(0), result(), COUNTS], (site.capacity(x.shape),), OP=site.op.name,
                 VALUE=float(site.op.attrs.get("value", 0.0)), X=dtype_of(site, y), D=width,  # type: ignore[arg-type]
                 BD=min(BLOCK, power(width)), SX=site.stride(0), **site.rows(x.shape))]


def binary(site: Site) -> list[Call]:
    """A pointwise op of two operands; a cast is x + 0 with another result type."""
    y = site.results[0]
    second = 0 if site.op.name == "cast" else 1
    a, b = site.operand(0).type, site.operand(second).type
    (sa, ea), (sb, eb) = _form(site, 0, a, y), _form(site, second, b, y)
    width = inner(y.shape)
    return [call("binary", [site.ref(0), site.ref(second), result(), COUNTS], (site.capacity(y.shape),),
                 OP=site.op.name, A=_stored(site, 0), B=_stored(site, second), Y=dtype_of(site, y), D=width,
                 BD=min(BLOCK, power(width)), SA=sa, EA=ea, SB=sb, EB=eb, **site.rows(y.shape))]


def _stored(site: Site, index: int) -> str:
    """Small weights are f32 vectors whatever their type."""
    operand = site.operand(index)
    return "f32" if operand.encoding is not None else dtype_of(site, operand.type)


def _form(site: Site, index: int, x: TensorType, y: TensorType) -> tuple[int, int]:
    """(distance of rows, distance of elements) of an operand that broadcasts to the result."""
    padded = (1,) * (y.rank - x.rank) + tuple(x.shape)
    row = site.stride(index) if x.rank == y.rank else inner(y.shape)
    if padded == tuple(y.shape):
        return row, 1
    if all(d == 1 for d in padded):
        return 0, 0
    if padded[0] == 1 and padded[1:] == tuple(y.shape[1:]):
        return 0, 1
    if padded[0] == y.shape[0] and all(d == 1 for d in padded[1:]):
        return row, 0
    raise site.fail(f"{x} does not broadcast to {y} row by row", "reshape it to [W], [T, 1] or the full shape")


def norm(site: Site) -> list[Call]:
    """rms_norm(x, w), narrow_rms_norm, add_rms_norm(x, r, w) and gated_rms_norm(x, z, w)."""
    x = site.activation(0)
    width = int(x.shape[-1])  # type: ignore[arg-type]
    heads = inner(x.shape) // width
    add, gate = site.op.name == "add_rms_norm", site.op.name == "gated_rms_norm"
    weight = 2 if add or gate else 1
    codes = [result(1), result(2)] if site.narrowing else []
    args = [site.ref(0), *([site.ref(1)] if add else []), site.ref(weight), *([site.ref(1)] if gate else []),
            *([result(0)] if add else []), result(1 if add else 0), *codes, COUNTS]
    return [call("rms_norm", args, (site.capacity(x.shape) * heads,), HEADS=heads, D=width, BD=power(width),
                 SX=site.stride(0), SR=site.stride(1) if add else 0, SZ=site.stride(1) if gate else 0,
                 EPS=site.real("eps"), ADD=add, GATE=gate, NARROW=site.narrowing, WARPS=_warps(width),
                 **site.rows(x.shape))]


def concat(site: Site) -> list[Call]:
    """One copy an operand."""
    types = [site.activation(i) for i in range(len(site.operands))]
    if site.op.attrs["axis"] not in (1, -1) or any(t.rank != 2 for t in types):
        raise site.fail("only the last axis of 2-D operands can be joined", "reshape the operands to [T, W]")
    calls, at, total = [], 0, inner(site.results[0].shape)
    for i, type_ in enumerate(types):
        width = inner(type_.shape)
        calls.append(call("copy_columns", [site.ref(i), result(), COUNTS], (site.capacity(type_.shape),), D=width,
                          BD=min(BLOCK, power(width)), SX=site.stride(i), SY=total, AT=at, **site.rows(type_.shape)))
        at += width
    return calls


def gather_rows(site: Site) -> list[Call]:
    x, index = site.activation(0), site.operand(1).type
    width = inner(x.shape)
    return [call("gather_rows", [site.ref(0), Ref("operand", index=1), result(), COUNTS], (site.capacity(index.shape),),
                 D=width, BD=power(width), SX=site.stride(0))]


def embedding(site: Site) -> list[Call]:
    ids, table = site.operand(0).type, site.operand(1).type
    encoding, weight = site.matrix(1)
    if encoding.format != "bf16":
        raise site.fail(f"an embedding table in {encoding.format}", "encode it as bf16")
    vocab, width = (int(d) for d in table.shape)  # type: ignore[arg-type]
    return [call("embedding", [Ref("operand", index=0), Ref("input", name="last"), *weight, result(), COUNTS],
                 (site.capacity(ids.shape),), VOCAB=vocab, D=width, BD=power(width))]
