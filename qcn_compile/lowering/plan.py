"""From a schedule to the plan: every argument becomes a name or an offset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, groupby, pairwise
from typing import Any

from qcn_compile.artifact import Arg, Collective, Launch, Plan, Route
from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.ir.types import StateRef, Sym
from qcn_compile.lowering.memory import Buffer, Key, assign, liveness
from qcn_compile.lowering.schedule import Schedule, encoding_of, row_width, weight_bytes, work
from qcn_compile.lowering.weights import BlobKey
from qcn_compile.targets.base import Ref

OUTPUT_NAMES = ("logits", "hidden")


def blobs_of(schedule: Schedule) -> dict[BlobKey, None]:
    """The packed weights a schedule reads, in order of first use."""
    keys: dict[BlobKey, None] = {}
    for step in schedule.steps:
        for ref in step.call.args:
            if ref.kind == "blob":
                keys[blob_key(step.op, ref)] = None
    return keys


def blob_key(op: Op, ref: Ref) -> BlobKey:
    """The weight value, layout and encoding a blob argument asks for."""
    value = op.operands[ref.index]
    assert value is not None
    encoding = encoding_of(value)
    bare = value.op.inputs[0] if encoding is not None and value.op is not None else value
    return BlobKey(bare, ref.layout, encoding or Encoding())


def make_plan(schedule: Schedule, names: Mapping[BlobKey, str]) -> tuple[Plan, list[Buffer]]:
    """The plan of one bucket, and the buffers behind its offsets (for the report)."""
    buffers = liveness(schedule)
    total = assign(buffers)
    offsets = {buffer.key: buffer.offset for buffer in buffers}
    launches = []
    for step, (bytes_, flops) in zip(schedule.steps, _works(schedule), strict=True):
        args = tuple(_argument(schedule, step.op, ref, offsets, names) for ref in step.call.args)
        launches.append(Launch(step.call.kernel.symbol, args, f"{step.op.name} %{step.op.results[0].name}",
                               str(step.op.loc), bytes_, flops, step.call.grid,
                               _collective(step.op) if step.collective else None, step.call.role,
                               tuple((kernel.symbol, grid) for kernel, grid in step.call.others)))
    bucket = schedule.bucket
    plan = Plan(schedule.graph.name, bucket.name, bucket.tokens, bucket.sequences, bucket.rows, total,
                tuple(launches), _outputs(schedule.graph, schedule, offsets), _routes(schedule, offsets))
    return plan, buffers


def _works(schedule: Schedule) -> Iterator[tuple[int, int]]:
    """(bytes, FLOPs) of each launch. In an op that mostly reads weights, each counts at the launch that reads it, and
    FLOPs follow them; what is left, and all of other ops, counts at the op's first launch."""
    for op, group in groupby(schedule.steps, key=lambda step: step.op):
        bytes_, flops = work(op, schedule.graph.states, schedule.bucket)
        seen: set[int] = set()
        read = []
        for step in group:
            own = {ref.index for ref in step.call.args if ref.kind == "blob"} - seen
            read.append(sum(weight_bytes(op, index, schedule.bucket) for index in own))
            seen |= own
        if 2 * sum(read) <= bytes_:
            read = [0] * len(read)
        ends = [flops * part // sum(read) for part in accumulate(read)] if sum(read) else [flops] * len(read)
        counted = [end - start for start, end in pairwise([0, *ends])]
        yield from zip([bytes_ - sum(read[1:]), *read[1:]], counted, strict=True)


def _routes(schedule: Schedule, offsets: Mapping[Key, int]) -> tuple[Route, ...]:
    """Where the routers leave their choices, for statistics."""
    last = {step.op: index for index, step in enumerate(schedule.steps) if step.op.name == "moe_route"}
    found = []
    for op, index in last.items():
        ids, logits = op.results[0], op.operands[0]
        assert logits is not None
        found.append(Route(index, op.loc.module, _placed(schedule, ids, offsets).offset, row_width(ids.tensor),
                           int(op.attrs["top_k"]), row_width(logits.tensor) - int(bool(op.attrs["shared"]))))  # type: ignore[arg-type]
    return tuple(found)


def _collective(op: Op) -> Collective:
    type_ = op.results[0].tensor if op.name == "recv" else op.inputs[0].tensor
    symbol = type_.shape[0]
    if not isinstance(symbol, Sym) or (symbol.scale, symbol.offset) != (1, 0):
        raise LoweringError(f"{op.name} at {op.loc}: a collective of {type_}; its rows must be T, S or R")
    return Collective(op.name, type_.dtype.value, symbol.name, row_width(type_),
                      int(op.attrs.get("to", op.attrs.get("source", -1))))  # type: ignore[arg-type]


def _argument(schedule: Schedule, op: Op, ref: Ref, offsets: Mapping[Key, int],
              names: Mapping[BlobKey, str]) -> Arg:
    if ref.kind in ("operand", "result"):
        value = op.operands[ref.index] if ref.kind == "operand" else op.results[ref.index]
        assert value is not None
        return _placed(schedule, value, offsets)
    if ref.kind == "scratch":
        return Arg("workspace", offset=offsets[id(op), ref.name])
    if ref.kind == "blob":
        return Arg("weight", f"{names[blob_key(op, ref)]}.{ref.part}")
    if ref.kind == "state":
        state = op.attrs.get(ref.name)
        if not isinstance(state, StateRef):
            raise LoweringError(f"{op.name} %{op.results[0].name}: attribute {ref.name!r} names no cache")
        return Arg("state", state.name, part=ref.part)
    if ref.kind == "input":
        return Arg("input", ref.name)
    raise LoweringError(f"{op.name}: argument kind {ref.kind!r} is unknown")


def _placed(schedule: Schedule, value: Value, offsets: Mapping[Key, int]) -> Arg:
    view = schedule.views[value]
    if view.base in schedule.graph.inputs:
        return Arg("input", view.base.name)
    return Arg("workspace", offset=offsets[view.base] + view.offset * view.base.tensor.dtype.bits // 8)


def _outputs(graph: Graph, schedule: Schedule, offsets: Mapping[Key, int]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for name, value in zip(OUTPUT_NAMES, graph.outputs, strict=False):
        view = schedule.views[value]
        if view.stride != row_width(value.tensor) or view.base in graph.inputs:
            raise LoweringError(f"output {name} (%{value.name}) of @{graph.name} is a view; end the graph with an op")
        table[name] = {"offset": offsets[view.base] + view.offset * 4, "dtype": value.tensor.dtype.value,
                       "width": row_width(value.tensor)}
    return table
