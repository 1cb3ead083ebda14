"""fuse-deltanet: the token mixer of a Gated DeltaNet layer becomes one op, from the convolution to the gated norm.

How it runs is the target's choice per bucket: one recurrence on the CPU, kernels for one token and for many on a GPU
(docs/ARCHITECTURE.md says why not in chunks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.ir.graph import Attr
from qcn_compile.ir.rewrite import Match, Rule
from qcn_compile.passes.base import RulePass, register_pass

_GATE = "mul(decay, softplus(add(cast?(a), cast?(dt_bias))))"
_RULE = ("rule:gated_delta_rule("
         "q:reshape(slice(mixed){axis=last,start=0,stop=$k0}){shape=$qs}, "
         "k:reshape(slice(mixed){axis=last,start=$k0,stop=$v0}){shape=$ks}, "
         "v:reshape(slice(mixed){axis=last,start=$v0,stop=$end}){shape=$vs}, "
         f"{_GATE}, sigmoid(b), batch){{qk_l2norm=true,state=$delta}}")
_CONV = "mixed = causal_conv1d(qkv, conv_w, none, batch){activation=\"silu\",state=$conv}"
_NET = ("delta_net(qkv, z, b, a, conv_w, decay, dt_bias, norm_w, batch){key_heads=$key_heads,"
        "value_heads=$value_heads,key_dim=$key_dim,value_dim=$value_dim,eps=$eps,conv=$conv,delta=$delta}")


def _heads(match: Match) -> dict[str, Attr]:
    q, v = match.values["q"].tensor.shape, match.values["v"].tensor.shape
    return {"key_heads": q[1], "key_dim": q[2], "value_heads": v[1], "value_dim": v[2]}  # type: ignore[dict-item]


def _flat_gate(match: Match) -> str | None:
    rank = match.values["z"].tensor.rank
    return None if rank == 2 else f"the gate z has rank {rank}; fold-layout should have left [T, heads*dim]"


RULES = [
    Rule("delta_net",
         f"reshape(gated_rms_norm(view?({_RULE}), view?(z), norm_w){{eps=$eps}}){{shape=$flat}} "
         f"where {_CONV} => {_NET}",
         guard=_flat_gate, derive=_heads, marker="gated_delta_rule"),
]


@register_pass
@dataclass(frozen=True)
class FuseDeltaNet(RulePass):
    """gated_norm(delta_rule(split(silu(conv(qkv))), gates), z) => delta_net(qkv, z, b, a, ...)."""

    name: ClassVar[str] = "fuse-deltanet"
    after: ClassVar[tuple[str, ...]] = ("fuse-norm", "fold-layout")
    rules: ClassVar[list[Rule]] = RULES
