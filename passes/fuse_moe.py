"""fuse-moe: router arithmetic becomes one op, and the shared expert joins the routed ones as one more expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.ir.graph import Attr, Graph
from qcn_compile.ir.rewrite import Match, Rule, rewrite
from qcn_compile.passes.base import Pass, PassContext, register_pass

_TOP = "where t = topk(softmax(logits){axis=last,dtype=f32}){k=$k}"
_ROUTED = "where r = moe_route(logits){top_k=$k,normalize=%s,shared=false}"
ROUTE = [
    Rule("route, weights normalised",
         "moe_experts(x, t.1, cast?(div(t.0, sum(t.0){axis=last,keepdim=true})), gu, dn){activation=$act} "
         f"{_TOP} => moe_experts(x, r.0, r.1, gu, dn){{activation=$act}} {_ROUTED % 'true'}", marker="topk"),
    Rule("route", f"moe_experts(x, t.1, cast?(t.0), gu, dn){{activation=$act}} {_TOP} => "
         f"moe_experts(x, r.0, r.1, gu, dn){{activation=$act}} {_ROUTED % 'false'}", marker="topk"),
]


def _same_width(match: Match) -> str | None:
    routed, shared = match.values["gu"].tensor.shape[1], match.values["sg"].tensor.shape[0]
    if routed == 2 * int(shared):  # type: ignore[arg-type]
        return None
    return f"the shared expert is {shared} wide, the routed ones {int(routed) // 2}: it stays apart"  # type: ignore


def _one_expert(match: Match) -> dict[str, Attr]:
    width, hidden = match.values["sg"].tensor.shape
    return {"up_shape": (1, 2 * int(width), hidden), "down_shape": (1, hidden, width)}  # type: ignore[arg-type,dict-item]


SHARED = [
    Rule("shared expert is one more expert",
         "add(moe_experts(x, r.0, r.1, gu, dn){activation=$act}, "
         "mul(sigmoid(linear(x, gate)), linear(mul(silu(linear(x, sg)), linear(x, su)), sd))) "
         "where r = moe_route(linear(x, router)){top_k=$k,normalize=$norm,shared=false} => "
         "moe_experts(x, n.0, n.1, concat(gu, reshape(concat(sg, su){axis=0}){shape=$up_shape}){axis=0}, "
         "concat(dn, reshape(sd){shape=$down_shape}){axis=0}){activation=$act} "
         "where n = moe_route(linear(x, concat(router, gate){axis=0})){top_k=$k,normalize=$norm,shared=true}",
         guard=_same_width, derive=_one_expert, marker="moe_experts"),
]


@register_pass
@dataclass(frozen=True)
class FuseMoE(Pass):
    """softmax, topk, normalise => moe_route; moe_experts + sigmoid(g) * shared => moe_experts of E+1 experts."""

    name: ClassVar[str] = "fuse-moe"
    after: ClassVar[tuple[str, ...]] = ("canonicalize",)
    fold_shared: bool = True

    def run(self, graph: Graph, context: PassContext) -> Graph:
        context.note(self.name, rewrite(graph, ROUTE))
        if self.fold_shared:
            context.note(self.name, [e for e in rewrite(graph, SHARED) if not self._already(graph, e.value, e.reason)])
        return graph

    @staticmethod
    def _already(graph: Graph, value: str, reason: str) -> bool:
        """Experts that hold the shared one already are no missed chance."""
        for op in graph.ops:
            if reason and op.name == "moe_experts" and op.results[0].name == value:
                route = op.operands[1].op if op.operands[1] is not None else None
                return route is not None and route.attrs.get("shared") is True
        return False
