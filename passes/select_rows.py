"""select-rows: logits are computed for the wanted tokens only.

Everything from the last op that mixes tokens to the logits works on one token at a time, so the gather may sit in front
of the output projection: in decode it changes nothing, in prefill it saves the projection of all but the last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.ir.graph import Graph, Value
from qcn_compile.ir.rewrite import Fired, Rewriter
from qcn_compile.ir.types import DType, R, TensorType
from qcn_compile.passes.base import Pass, PassContext, register_pass


@register_pass
@dataclass(frozen=True)
class SelectRows(Pass):
    """logits = linear(h, w) => linear(gather_rows(h, rows), w), with a new input rows: i32[R]."""

    name: ClassVar[str] = "select-rows"
    after: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        logits = graph.outputs[0]
        producer = logits.op
        if producer is None or producer.name != "linear":
            reason = f"the logits come from {producer.name if producer else 'an input'}, not from a projection"
            context.note(self.name, [Fired("gather first", graph.name, logits.name, reason)])
            return graph
        rows = Value("rows", TensorType(DType.i32, (R,)))
        graph.inputs.append(rows)
        rewriter = Rewriter(graph)
        hidden, weight = producer.inputs[:2]
        wanted = rewriter.make("gather_rows", [hidden, rows], {}, producer.loc, hidden.name)
        fresh = rewriter.make("linear", [wanted.result, weight], {}, producer.loc, logits.name)
        graph.outputs[0] = fresh.result
        context.note(self.name, [Fired("gather first", str(producer.loc), logits.name)])
        return rewriter.finish()
