"""Rules of ATen ops that only move data: views, slices, joins and copies onto a part of a tensor."""

from __future__ import annotations

from torch import fx

from qcn_compile.errors import IRError
from qcn_compile.frontend.aten_rules import Call, Result, Strided, dims, rule, stripped
from qcn_compile.ir.graph import Value
from qcn_compile.ir.types import Dim


@rule("view", "reshape", "_unsafe_view")
def _reshape(c: Call) -> Result:
    traced, value = c.shape(), c.self()
    if any(d != 1 for d in traced[:len(traced) - value.tensor.rank]):
        raise IRError(f"reshape of {list(map(str, traced))}, whose leading axis is a repetition")
    return c.build.reshape(value, stripped(dims(c.node.meta["val"])))


@rule("expand")
def _expand(c: Call) -> Result:
    value, shape = c.self(), dims(c.node.meta["val"])
    if value.tensor.shape != shape[len(shape) - value.tensor.rank:]:
        raise IRError(f"{value.type} repeated to {list(map(str, shape))}; only a leading axis may repeat")
    return value


@rule("unsqueeze")
def _unsqueeze(c: Call) -> Result:
    value, shape = c.self(), dims(c.node.meta["val"])
    dropped = len(shape) - 1 - value.tensor.rank
    at = c.args["dim"] % len(shape) - dropped
    if at <= 0 and stripped((1, *value.tensor.shape)) == value.tensor.shape:
        return value
    inner = value.tensor.shape
    return c.build.reshape(value, (*inner[:at], 1, *inner[at:]))


@rule("squeeze.dim")
def _squeeze(c: Call) -> Result:
    axis, value = c.axis(c.args["dim"]), c.self()
    if axis < 0 or value.tensor.shape[axis] != 1:
        return value
    return c.build.reshape(value, value.tensor.shape[:axis] + value.tensor.shape[axis + 1:])


@rule("transpose.int")
def _transpose(c: Call) -> Result:
    value = c.self()
    axes = [c.axis(c.args["dim0"]), c.axis(c.args["dim1"])]
    missing = max(0, -min(axes))
    if missing and max(axes) >= 0:
        value = c.build.reshape(value, (1,) * missing + value.tensor.shape)
        axes = [a + missing for a in axes]
    return value if max(axes) < 0 else c.build.transpose(value, *axes)


def _bounds(c: Call, size: Dim) -> tuple[int, Dim]:
    """First row and end of a slice of an axis, clamped as Python does."""
    start, end = c.args["start"] or 0, c.args["end"]
    if not isinstance(start, int) or not isinstance(end, int | None):
        raise IRError("a slice whose bounds depend on the number of tokens")
    if isinstance(size, int):
        stop = size if end is None else min(end, size)
        return (start + size if start < 0 else start), (stop + size if stop < 0 else stop)
    if start != 0 or (end is not None and end < 1 << 62):
        raise IRError(f"slice {start}:{end} of the tokens")
    return 0, size


@rule("slice.Tensor")
def _slice(c: Call) -> Result:
    value, axis = c.self(), c.axis(c.args["dim"])
    if axis < 0:
        return value
    start, stop = _bounds(c, value.tensor.shape[axis])
    if c.args["step"] != 1:
        return Strided(value, (axis, c.args["start"], c.args["end"], c.args["step"]))
    if not isinstance(stop, int):
        return value
    return c.build.slice(value, axis, start, stop)


@rule("select.int")
def _select(c: Call) -> Result:
    value, axis = c.self(), c.axis(c.args["dim"])
    if axis < 0:
        return value
    size = value.tensor.shape[axis]
    if not isinstance(size, int):
        raise IRError("one token selected out of all")
    index = c.args["index"] % size
    shape = value.tensor.shape[:axis] + value.tensor.shape[axis + 1:]
    return c.build.reshape(c.build.slice(value, axis, index, index + 1), shape)


@rule("split.Tensor", "split_with_sizes", "chunk")
def _split(c: Call) -> Result:
    value, axis = c.self(), c.kept_axis(c.args["dim"])
    parts: list[Result] = []
    start = 0
    for traced in c.node.meta["val"]:
        size = traced.shape[c.args["dim"]]
        if not isinstance(size, int):
            raise IRError("a split of the tokens")
        parts.append(c.build.slice(value, axis, start, start + size))
        start += size
    return parts


@rule("cat")
def _concat(c: Call) -> Result:
    nodes: list[fx.Node] = c.args["tensors"]
    rank = max(c.value(n).tensor.rank for n in nodes)
    operands: list[Value | None] = []
    for node in nodes:
        shape = dims(node.meta["val"])
        operands.append(c.build.reshape(c.value(node), shape[len(shape) - rank:]))
    axis = c.args["dim"] % len(shape) - (len(shape) - rank)
    if axis < 0:
        raise IRError("tensors joined along the batch axis")
    return c.build.one("concat", operands, axis=axis)


@rule("copy")
def _copy(c: Call) -> Result:
    source = c.result(c.args["src"])
    return c.build.cast(source, c.self().tensor.dtype) if isinstance(source, Value) else source


@rule("slice_scatter")
def _slice_scatter(c: Call) -> Result:
    """Writing a part of a tensor back onto itself changes nothing; no other scatter is known."""
    value, source = c.self(), c.result(c.args["src"])
    place = (c.axis(c.args["dim"]), c.args["start"], c.args["end"], c.args["step"])
    if isinstance(source, Strided) and source == Strided(value, place):
        return value
    raise IRError("a tensor written onto a part of another one")


@rule("select_scatter")
def _select_scatter(c: Call) -> Result:
    """As `slice_scatter`, for a leading axis that only repeats."""
    value = c.self()
    if c.axis(c.args["dim"]) < 0 and c.result(c.args["src"]) is value:
        return value
    raise IRError("a tensor written onto a part of another one")
