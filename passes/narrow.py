"""Parts of values: the columns of a projection followed back to rows of its weight, and slabs of weights.

Used by `shard`. A run is (start, count). What is cut is cut at the weights, so that a rank reads no more than it keeps.
"""

from __future__ import annotations

from qcn_compile.errors import PassError
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.rewrite import Rewriter

Run = tuple[int, int]
Runs = tuple[Run, ...]
POINTWISE = ("exp", "neg", "add_scalar", "mul_scalar", "cast", "softplus")


def whole(runs: Runs, size: int) -> bool:
    """Whether the runs are everything, in order."""
    return joined(runs) == ((0, size),)


def joined(runs: Runs) -> Runs:
    """Runs that touch become one."""
    out: list[Run] = []
    for start, count in runs:
        if out and sum(out[-1]) == start:
            out[-1] = (out[-1][0], out[-1][1] + count)
        else:
            out.append((start, count))
    return tuple(out)


def compose(outer: Runs, inner: Runs) -> Runs:
    """The runs of x that take(take(x, inner), outer) reads."""
    out: list[Run] = []
    for start, count in outer:
        at = 0
        for begin, length in inner:
            low, high = max(start, at), min(start + count, at + length)
            if low < high:
                out.append((begin + low - at, high - low))
            at += length
    return joined(tuple(out))


def columns(rewriter: Rewriter, value: Value, runs: Runs) -> Value:
    """Columns of value [T, ...], its later axes taken as one, as [T, columns]: a narrower projection."""
    op = value.op
    if op is not None and op.name == "reshape" and op.inputs[0].tensor.shape[0] == value.tensor.shape[0]:
        return columns(rewriter, op.inputs[0], runs)
    if op is not None and op.name == "slice" and op.attrs["axis"] == 1 and op.inputs[0].tensor.rank == 2:
        start = int(op.attrs["start"])  # type: ignore[arg-type]
        return columns(rewriter, op.inputs[0], tuple((start + at, count) for at, count in runs))
    if op is None or op.name != "linear":
        raise PassError(f"shard: %{value.name} comes from {op.name if op else 'an input'}, not from a projection, "
                        "so ranks cannot share its channels; keep fold-layout and the fusions in the pipeline")
    parts: list[Value | None] = [op.inputs[0], *(rows(rewriter, v, runs) for v in op.inputs[1:])]
    return rewriter.make("linear", parts, {}, op.loc, value.name).result


def rows(rewriter: Rewriter, value: Value, runs: Runs) -> Value:
    """Rows of a weight, taken from the tensors of the checkpoint where that is possible."""
    if whole(runs, int(value.tensor.shape[0])):  # type: ignore[arg-type]
        return value
    op = value.op
    assert op is not None
    if op.name == "take_rows":
        return rows(rewriter, op.inputs[0], compose(runs, op.attrs["runs"]))  # type: ignore[arg-type]
    if op.name == "concat" and op.attrs["axis"] == 0:
        return _stacked(rewriter, op, value, runs)
    if op.name in POINTWISE and len(op.inputs) == 1:
        return rewriter.make(op.name, [rows(rewriter, op.inputs[0], runs)], dict(op.attrs), op.loc, value.name).result
    if op.name == "reshape" and op.inputs[0].tensor.shape[0] == value.tensor.shape[0]:
        part = rows(rewriter, op.inputs[0], runs)
        shape = (part.tensor.shape[0], *value.tensor.shape[1:])
        return rewriter.make("reshape", [part], {"shape": shape}, op.loc, value.name).result  # type: ignore[dict-item]
    return rewriter.make("take_rows", [value], {"runs": joined(runs)}, op.loc, value.name).result


def _stacked(rewriter: Rewriter, op: Op, value: Value, runs: Runs) -> Value:
    """Rows of weights one above the other: rows of each."""
    parts: list[Value | None] = []
    for start, count in joined(runs):
        at = 0
        for source in op.inputs:
            size = int(source.tensor.shape[0])  # type: ignore[arg-type]
            low, high = max(start, at), min(start + count, at + size)
            if low < high:
                parts.append(rows(rewriter, source, ((low - at, high - low),)))
            at += size
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    return rewriter.make("concat", parts, {"axis": 0}, op.loc, value.name).result


def slab(rewriter: Rewriter, value: Value, axis: int, runs: Runs) -> Value:
    """Runs along a later axis of a weight, cut from each of the weights it is stacked from."""
    if whole(runs, int(value.tensor.shape[axis])):  # type: ignore[arg-type]
        return value
    op = value.op
    assert op is not None
    if op.name == "concat" and op.attrs["axis"] == 0:
        parts = [slab(rewriter, source, axis, runs) for source in op.inputs]
        return rewriter.make("concat", list(parts), {"axis": 0}, op.loc, value.name).result
    cuts: list[Value | None] = [
        rewriter.make("slice", [value], {"axis": axis, "start": start, "stop": start + count}, op.loc,
                      value.name).result for start, count in runs]
    if len(cuts) == 1 and cuts[0] is not None:
        return cuts[0]
    return rewriter.make("concat", cuts, {"axis": axis}, op.loc, value.name).result
