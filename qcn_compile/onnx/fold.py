"""What depends on weights alone: computed when the model is written, as a build does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.ir.interpret import Weights, run_op


def folded(graph: Graph) -> tuple[set[Op], set[Value]]:
    """The ops that need no input of the graph, those that only hold literals excepted; and their results that others
    read."""
    ready: set[Op] = set()
    fixed: set[Op] = set()  # literals too
    for op in graph.ops:
        if all(v.op in fixed for v in op.inputs):
            fixed.add(op)
            if op.name != "constant" and (op.name == "weight" or any(v.op in ready for v in op.inputs)):
                ready.add(op)
    read = {v for op in graph.ops if op not in ready for v in op.inputs} | set(graph.outputs)
    return ready, {v for v in read if v.op in ready}


def evaluate(value: Value, weights: Weights) -> Tensor:
    """The tensor of a value that needs no input."""
    done: dict[Value, Any] = {}

    def of(wanted: Value) -> Any:
        if wanted not in done:
            op = wanted.op
            assert op is not None
            results = run_op(op, [None if v is None else of(v) for v in op.operands], weights)
            done.update(zip(op.results, results, strict=True))
        return done[wanted]

    found: Tensor = of(value)
    return found
