"""select-quantization: how every weight is stored, and why.

Weights of matrix products and experts take the asked format. Sensitive ones keep the base dtype: the router, the gates
of DeltaNet (small, and their error is not averaged away), the embedding table (a look-up, no product). Vectors (norms,
convolution, decay) stay in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.ir import fp4, int4
from qcn_compile.ir.encoding import GROUP
from qcn_compile.ir.fp8 import BLOCK
from qcn_compile.ir.graph import Attr, Graph, Op
from qcn_compile.ir.optable import row
from qcn_compile.ir.rewrite import Fired, Rewriter
from qcn_compile.passes.base import Pass, PassContext, register_pass

WEIGHTS = {"linear": (1,), "linear_add": (1,), "embedding": (1,), "moe_experts": (3, 4), "moe_add": (3, 4)}
VIEWS = ("slice", "reshape")


@register_pass
@dataclass(frozen=True)
class SelectQuantization(Pass):
    """w => encode(w){format, group, activations}.

    format: none, int8, int4, int4-g128, fp8 or nvfp4; base: f32 or bf16. experts, dense, head: another format for a
    class of weights; head is what makes the first output, the logits. group: values of a row that
    share a scale (0: as the format has it).
    """

    name: ClassVar[str] = "select-quantization"
    after: ClassVar[tuple[str, ...]] = ("fuse-deltanet", "fuse-moe", "select-rows")
    base: str = "f32"
    format: str = "none"
    experts: str = ""
    dense: str = ""
    head: str = ""
    group: int = 0
    activations: str = "f32"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        rewriter = Rewriter(graph)
        sensitive, logits = find_sensitive(graph), graph.outputs[0].op
        while logits is not None and row(logits.name).collective:
            logits = logits.inputs[0].op
        for op in list(graph.ops):
            kind = self.experts if op.name.startswith("moe_") else self.head if op is logits else self.dense
            for index in WEIGHTS.get(op.name, ()):
                self._encode(rewriter, op, index, kind or self.format, sensitive.get(op), context)
        return rewriter.finish()

    def _encode(self, rewriter: Rewriter, op: Op, index: int, format_: str, reason: str | None,
                context: PassContext) -> None:
        weight = op.operands[index]
        assert weight is not None
        keep = "the base dtype was asked for" if format_ in ("none", self.base) else reason
        if keep is None and op.name == "embedding":
            keep = "a table look-up reads one row a token: nothing to save"
        fp8 = "fp8" in (self.format, self.dense, self.experts, self.head)
        four = {"nvfp4": fp4.GROUP, "int4-g128": int4.GROUP}.get(format_)
        group = four if four and not keep else self.group or (BLOCK if fp8 else GROUP)
        attrs: dict[str, Attr] = {"format": self.base if keep else format_, "group": group,
                                  "activations": "f32" if keep else self.activations}
        fresh = rewriter.make("encode", [weight], attrs, op.loc, weight.name).result
        op.operands[index] = fresh
        rewriter.users[fresh].append(op)
        context.note(self.name, [Fired(f"{attrs['format']}", str(op.loc), weight.name, keep or "")])


def find_sensitive(graph: Graph) -> dict[Op, str]:
    """Projections whose result is a router's logits or a DeltaNet gate, each with the reason to keep it precise."""
    found: dict[Op, str] = {}
    for op in graph.ops:
        marked = {"moe_route": [(0, "router: an error changes which experts run")],
                  "delta_net": [(2, "DeltaNet gate beta"), (3, "DeltaNet decay")]}.get(op.name, [])
        for index, reason in marked:
            producer = op.operands[index].op if op.operands[index] is not None else None  # type: ignore[union-attr]
            while producer is not None and producer.name in VIEWS:
                producer = producer.inputs[0].op
            if producer is not None and producer.name == "linear":
                found[producer] = reason
    return found


