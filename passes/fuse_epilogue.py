"""fuse-epilogue: products and residual adds move into the op that makes their operand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.ir.rewrite import Match, Rule
from qcn_compile.passes.base import RulePass, register_pass


def _two_dims(match: Match) -> str | None:
    shapes = match.values["r"].tensor.shape, match.values["y"].tensor.shape
    return None if shapes[0] == shapes[1] and len(shapes[0]) == 2 else f"shapes {shapes[0]} and {shapes[1]} broadcast"


RULES = [
    Rule("silu_mul", "mul(silu(gate), up) => silu_mul(gate, up)"),
    Rule("mul_sigmoid", "mul(x, sigmoid(gate)) => mul_sigmoid(x, gate)"),
    Rule("linear_add", "add(r, y:linear(x, w)) => linear_add(x, w, r)", guard=_two_dims, single=("y",)),
    Rule("moe_add", "add(r, y:moe_experts(x, ids, p, gu, dn){activation=$act}) => "
         "moe_add(x, ids, p, gu, dn, r){activation=$act}", guard=_two_dims, single=("y",)),
    Rule("add_rms_norm", "rms_norm(s:add(x, r), w){eps=$eps} => t.1; s <- t.0 "
         "where t = add_rms_norm(x, r, w){eps=$eps}"),
]


@register_pass
@dataclass(frozen=True)
class FuseEpilogue(RulePass):
    """add(r, linear(x, w)) => linear_add(x, w, r), the same for experts; then add + norm, SwiGLU, gates."""

    name: ClassVar[str] = "fuse-epilogue"
    after: ClassVar[tuple[str, ...]] = ("fuse-norm", "fuse-moe", "fuse-attention")
    rules: ClassVar[list[Rule]] = RULES
