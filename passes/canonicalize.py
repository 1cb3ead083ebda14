"""canonicalize: one spelling for every computation, weights first, nothing dead, nothing twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.ir.optable import row
from qcn_compile.ir.rewrite import Fired, Rewriter, Rule, remove_dead, rewrite
from qcn_compile.ir.types import Sym
from qcn_compile.passes.base import Pass, PassContext, register_pass

RULES = [
    Rule("reshape of reshape", "reshape(reshape(x){shape=$inner}){shape=$shape} => reshape(x){shape=$shape}"),
    Rule("cast of cast to the same dtype", "cast(cast(x){dtype=$d}){dtype=$d} => cast(x){dtype=$d}"),
]


@register_pass
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Folds no-ops, shares equal ops, hoists weight-only computation to the top and drops what nothing reads."""

    name: ClassVar[str] = "canonicalize"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        before = len(graph.ops)
        _trim(graph)
        _forward_identities(graph)
        _merge_slices(graph)
        context.note(self.name, rewrite(graph, RULES))
        cancel_transposes(graph)
        _forward_identities(graph)
        hoist_weights(graph)
        share_equal(graph)
        remove_dead(graph)
        context.note(self.name, [Fired("clean up", graph.name, f"{before} -> {len(graph.ops)} ops")])
        return graph


def _trim(graph: Graph) -> None:
    """Absent optional operands at the end are left out."""
    for op in graph.ops:
        while op.operands and op.operands[-1] is None and len(op.operands) > row(op.name).arity()[0]:
            op.operands.pop()


def _merge_slices(graph: Graph) -> None:
    """A slice of a slice along the same axis is one slice."""
    for op in graph.ops:
        inner = op.operands[0].op if op.name == "slice" and op.operands[0] is not None else None
        if inner is None or inner.name != "slice" or inner.attrs["axis"] != op.attrs["axis"]:
            continue
        shift = int(inner.attrs["start"])  # type: ignore[arg-type]
        op.operands = [inner.operands[0]]
        op.attrs |= {"start": shift + int(op.attrs["start"]), "stop": shift + int(op.attrs["stop"])}  # type: ignore


def _forward_identities(graph: Graph) -> None:
    """Reshapes, casts, slices, expands and one-part concats that change nothing hand their operand on."""
    swap: dict[Value, Value] = {}
    for op in graph.ops:
        op.operands = [swap.get(v, v) if v is not None else None for v in op.operands]
        neutral = op.name in ("reshape", "cast", "slice", "expand") or (op.name == "concat" and len(op.operands) == 1)
        if neutral and op.operands[0] is not None and str(op.operands[0].type) == str(op.result.type):
            swap[op.result] = op.operands[0]
    graph.outputs = [swap.get(v, v) for v in graph.outputs]


def cancel_transposes(graph: Graph) -> None:
    """Two exchanges of the same axes, one right after the other, are none."""
    rewriter = Rewriter(graph)
    for op in list(graph.ops):
        inner = op.operands[0].op if op.name == "transpose" and op.operands[0] is not None else None
        if inner is None or inner.name != "transpose" or inner.operands[0] is None:
            continue
        if {op.attrs["a"], op.attrs["b"]} == {inner.attrs["a"], inner.attrs["b"]}:
            rewriter.replace(op.result, inner.operands[0])
    rewriter.finish()


def static_values(graph: Graph) -> set[Value]:
    """Values that depend on weights and constants alone: the compiler computes them, not the served process."""
    known: set[Value] = set()
    for op in graph.ops:
        if all(v in known for v in op.inputs) and not row(op.name).effects and _static(op):
            known.update(op.results)
    return known


def _static(op: Op) -> bool:
    return not any(isinstance(d, Sym) for v in op.results for d in v.tensor.shape)


def hoist_weights(graph: Graph) -> None:
    """Weight-only ops first, each part in its old order."""
    static = static_values(graph)
    graph.ops.sort(key=lambda op: op.results[0] not in static)


def share_equal(graph: Graph) -> None:
    """Equal pure ops on equal operands become one."""
    seen: dict[object, Op] = {}
    swap: dict[Value, Value] = {}
    kept = []
    for op in graph.ops:
        op.operands = [swap.get(v, v) if v is not None else None for v in op.operands]
        if row(op.name).effects:
            kept.append(op)
            continue
        key = (op.name, tuple(map(id, op.operands)), tuple(sorted(op.attrs.items(), key=lambda kv: kv[0])))
        twin = seen.setdefault(key, op)
        if twin is op:
            kept.append(op)
        else:
            swap.update(zip(op.results, twin.results, strict=True))
    graph.ops = kept
    graph.outputs = [swap.get(v, v) for v in graph.outputs]
