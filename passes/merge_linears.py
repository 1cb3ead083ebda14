"""merge-linears: projections of the same input become one: the input is read once, one launch does the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.ir.rewrite import Fired, Rewriter
from qcn_compile.passes.base import Pass, PassContext, register_pass


@register_pass
@dataclass(frozen=True)
class MergeLinears(Pass):
    """linear(x, a), linear(x, b) => slices of linear(x, concat(a, b)), where a and b are stored alike."""

    name: ClassVar[str] = "merge-linears"
    after: ClassVar[tuple[str, ...]] = ("select-quantization",)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        groups: dict[Value, list[Op]] = {}
        for op in graph.ops:
            if op.name == "linear" and len(op.inputs) == 2:
                groups.setdefault(op.inputs[0], []).append(op)
        rewriter = Rewriter(graph)
        for ops in groups.values():
            for alike in _by_storage(ops, self.name, context):
                context.note(self.name, [_merge(rewriter, alike)])
        return rewriter.finish()


def _storage(op: Op) -> tuple[object, ...]:
    encode = op.inputs[1].op
    return tuple(sorted(encode.attrs.items())) if encode is not None and encode.name == "encode" else ()


def _by_storage(ops: list[Op], name: str, context: PassContext) -> list[list[Op]]:
    """Groups of at least two ops whose weights are stored alike; the others are noted with the reason."""
    table: dict[tuple[object, ...], list[Op]] = {}
    for op in ops:
        table.setdefault(_storage(op), []).append(op)
    if len(table) > 1:
        for op in (group[0] for group in table.values() if len(group) == 1):
            reason = "its neighbours on the same input are stored in another format"
            context.note(name, [Fired("merge", str(op.loc), op.result.name, reason)])
    return [group for group in table.values() if len(group) > 1]


def _merge(rewriter: Rewriter, ops: list[Op]) -> Fired:
    loc = ops[0].loc
    weights = [op.inputs[1] for op in ops]
    encoded = weights[0].op if weights[0].op is not None and weights[0].op.name == "encode" else None
    bare = [w.op.inputs[0] for w in weights if w.op is not None] if encoded else weights
    merged = rewriter.make("concat", list(bare), {"axis": 0}, loc, bare[0].name).result
    if encoded:
        merged = rewriter.make("encode", [merged], dict(encoded.attrs), loc, merged.name).result
    wide = rewriter.make("linear", [ops[0].inputs[0], merged], {}, loc, ops[0].result.name).result
    start = 0
    for op in ops:
        width = int(op.result.tensor.shape[-1])  # type: ignore[arg-type]
        attrs = {"axis": wide.tensor.rank - 1, "start": start, "stop": start + width}
        part = rewriter.make("slice", [wide], attrs, op.loc, op.result.name)  # type: ignore[arg-type]
        rewriter.replace(op.result, part.result)
        start += width
    return Fired(f"merge {len(ops)}", str(loc), wide.name)
