"""fuse-norm: the arithmetic of RMS normalisation becomes one op; the gate of DeltaNet's output norm joins it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.ir.rewrite import Match, Rule
from qcn_compile.passes.base import RulePass, register_pass

_UNIT = ("mul(cast?(x), rsqrt(add_scalar(mean(pow(cast?(x)){exponent=2.0}){axis=last,keepdim=true})"
         "{value=$eps}))")



def _casts_back(match: Match) -> str | None:
    have, want = match.values["x"].tensor.dtype, match.attrs["dtype"]
    return None if have is want else f"x is {have.value}, the result is cast to another dtype"


RULES = [
    # the weight product comes last, then (in a bf16 graph) the cast back; zero-centred weights arrive as 1+w
    Rule("rms_norm, cast back", f"cast(mul(cast?({_UNIT}), cast?(w))){{dtype=$dtype}} => rms_norm(x, w){{eps=$eps}}",
         guard=_casts_back, marker="rsqrt"),
    Rule("rms_norm", f"mul(cast?({_UNIT}), cast?(w)) => rms_norm(x, w){{eps=$eps}}", marker="rsqrt"),
    Rule("gated_rms_norm, cast back",
         "cast(mul(cast?(rms_norm(x, w){eps=$eps}), silu(cast?(z)))){dtype=$dtype} => "
         "gated_rms_norm(x, z, w){eps=$eps}",
         guard=_casts_back),
    Rule("gated_rms_norm",
         "mul(cast?(rms_norm(x, w){eps=$eps}), silu(cast?(z))) => gated_rms_norm(x, z, w){eps=$eps}"),
]


@register_pass
@dataclass(frozen=True)
class FuseNorm(RulePass):
    """x * rsqrt(mean(x^2) + eps) * w => rms_norm(x, w), and rms_norm(x, w) * silu(z) => gated_rms_norm(x, z, w)."""

    name: ClassVar[str] = "fuse-norm"
    after: ClassVar[tuple[str, ...]] = ("canonicalize",)
    rules: ClassVar[list[Rule]] = RULES
