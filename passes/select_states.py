"""select-states: DeltaNet states are stored in bfloat16, half the memory of a sequence; the arithmetic stays fp32.

They are rounded after every token, not at the end of a step: so a state depends on the tokens alone, and cached,
chunked and batched prompts keep giving the same answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qcn_compile.ir.graph import Graph
from qcn_compile.ir.rewrite import Fired
from qcn_compile.ir.types import DType, StateRef
from qcn_compile.passes.base import Pass, PassContext, register_pass


@register_pass
@dataclass(frozen=True)
class SelectStates(Pass):
    """delta_net {delta=@s} over f32 s => delta_net {delta=@s, rounds="bf16"} over bf16 s; nothing for f32."""

    name: ClassVar[str] = "select-states"
    after: ClassVar[tuple[str, ...]] = ("fuse-deltanet",)
    dtype: str = "bf16"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        if self.dtype == DType.f32.value:
            return graph
        for op in graph.ops:
            if op.name == "gated_delta_rule":
                context.note(self.name, [Fired(self.dtype, str(op.loc), op.result.name, "fuse-deltanet left it")])
            state = op.attrs.get("delta")
            if op.name != "delta_net" or not isinstance(state, StateRef):
                continue
            op.attrs["rounds"] = self.dtype
            graph.states[state.name] = replace(graph.states[state.name], dtype=DType(self.dtype))
            context.note(self.name, [Fired(self.dtype, str(op.loc), op.result.name)])
        return graph
