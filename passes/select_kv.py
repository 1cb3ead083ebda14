"""select-kv: keys and values are cached in another type than they are computed in, e4m3 at half the memory and reads.

Codes stand for their own values (a scale of 1): keys are normalised before they are cached and values are small, far
below the largest e4m3 number of 448.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qcn_compile.ir.graph import Graph
from qcn_compile.ir.rewrite import Fired
from qcn_compile.ir.types import DType, StateRef
from qcn_compile.passes.base import Pass, PassContext, register_pass

USERS = ("rope_append", "paged_attention")


@register_pass
@dataclass(frozen=True)
class SelectKv(Pass):
    """rope_append {state=@s}, paged_attention {state=@s} over bf16 s => the same {stored="f8e4m3"} over f8e4m3 s."""

    name: ClassVar[str] = "select-kv"
    after: ClassVar[tuple[str, ...]] = ("fuse-attention",)
    dtype: str = DType.f8e4m3.value

    def run(self, graph: Graph, context: PassContext) -> Graph:
        for op in graph.ops:
            state = op.attrs.get("state")
            if op.name == "attention":
                context.note(self.name, [Fired(self.dtype, str(op.loc), op.result.name, "fuse-attention left it")])
            if op.name not in USERS or not isinstance(state, StateRef):
                continue
            op.attrs["stored"] = self.dtype
            graph.states[state.name] = replace(graph.states[state.name], dtype=DType(self.dtype))
            context.note(self.name, [Fired(self.dtype, str(op.loc), op.result.name)])
        return graph
