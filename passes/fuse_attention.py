"""fuse-attention: q/k norm, rotary embedding and cache append become one op; attention and its output gate another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcn_compile.ir.graph import Attr, Graph
from qcn_compile.ir.rewrite import Match, Rule, rewrite
from qcn_compile.passes.base import PassContext, RulePass, register_pass
from qcn_compile.passes.canonicalize import cancel_transposes, share_equal

# transformers turns [T, heads, D] into [heads, T, D] before it rotates; halves are paired (GPT-NeoX order)
_X = "transpose(x){a=0,b=1}"
_TURN = ("concat(neg(slice(transpose(x){a=0,b=1}){axis=last,start=$half,stop=$rotary}), "
         "slice(transpose(x){a=0,b=1}){axis=last,start=0,stop=$half}){axis=last}")
_HEAD = "slice(transpose(x){a=0,b=1}){axis=last,start=0,stop=$rotary}"
_TAIL = "slice(transpose(x){a=0,b=1}){axis=last,start=$rotary,stop=$dim}"
_TABLE = {True: "view?(cast?(mul_scalar(%s(concat(f, f){axis=1})){value=$scaling}))",
          False: "view?(cast?(%s(concat(f, f){axis=1})))"}
_ANGLE = "where f = mul(view?(cast?(view?(positions))), view?(inv_freq))"
_ROPE = "=> transpose(rope(x, t.0, t.1)){a=0,b=1} where t = rope_table(positions, inv_freq){scaling=$scaling}"


def _halves(match: Match) -> str | None:
    half, rotary = match.attrs["half"], match.attrs["rotary"]
    if isinstance(half, int) and isinstance(rotary, int) and 2 * half == rotary:
        return None
    return f"halves of {half} do not make {rotary} rotary dims"


def _unscaled(match: Match) -> dict[str, Attr]:
    return {"scaling": 1.0}


def _rope_rule(partial: bool, scaled: bool) -> Rule:
    """Rotation of the first dims or of all; `scaled` tables carry YaRN's factor."""
    cos, sin = _TABLE[scaled] % "cos", _TABLE[scaled] % "sin"
    left = f"add(mul({_HEAD if partial else _X}, {cos}), mul({_TURN}, {sin}))"
    if partial:
        left = f"concat({left}, {_TAIL}){{axis=last}}"
    name = f"rope of {'the first' if partial else 'all'} dims{', scaled' if scaled else ''}"
    return Rule(name, f"{left} {_ANGLE} {_ROPE}", guard=_halves, derive=None if scaled else _unscaled)


def _doubled(trig: str) -> list[Rule]:
    """Some models double the table, not the angle."""
    return [Rule(f"doubled {trig}", f"concat({trig}(f), {trig}(f)){{axis=$a}} => {trig}(concat(f, f){{axis=$a}})"),
            Rule(f"doubled {trig}, scaled",
                 f"concat(mul_scalar({trig}(f)){{value=$v}}, mul_scalar({trig}(f)){{value=$v}}){{axis=$a}} => "
                 f"mul_scalar({trig}(concat(f, f){{axis=$a}})){{value=$v}}")]


DOUBLED = _doubled("cos") + _doubled("sin")
ROPE = [_rope_rule(partial, scaled) for partial in (True, False) for scaled in (True, False)]

_NORMED = ("rope(rms_norm(q, qw){eps=$eps}, cos, sin), rope(rms_norm(k, kw){eps=$eps}, cos, sin)")
_ATTEND = "attention(%s, v, batch){scale=$scale,causal=true,state=$state}"
_APPEND = "rope_append(q, k, v, %s, cos, sin, batch){eps=$eps,state=$state}"


def _attention_rule(name: str, heads: str, weights: str, gated: bool) -> Rule:
    plain = f"reshape({_ATTEND % heads}){{shape=$flat}}"
    left = f"mul({plain}, sigmoid(gate))" if gated else plain
    append = _APPEND % weights
    if weights == "none, none":
        append = append.replace("eps=$eps", "eps=0.0")
    right = f"paged_attention({append}, {'gate' if gated else 'none'}, batch){{scale=$scale,state=$state}}"
    return Rule(name, f"{left} => {right}", guard=_flat, marker="attention")


def _flat(match: Match) -> str | None:
    shape = match.attrs["flat"]
    return None if isinstance(shape, tuple) and len(shape) == 2 else "its result is not flattened to [T, heads*dim]"


_BARE = "rope(q, cos, sin), rope(k, cos, sin)"
ATTENTION = [
    _attention_rule("gated attention, q/k norm", _NORMED, "qw, kw", gated=True),
    _attention_rule("attention, q/k norm", _NORMED, "qw, kw", gated=False),
    _attention_rule("gated attention", _BARE, "none, none", gated=True),
    _attention_rule("attention", _BARE, "none, none", gated=False),
]


@register_pass
@dataclass(frozen=True)
class FuseAttention(RulePass):
    """attention(rope(norm(q)), rope(norm(k)), v) * sigmoid(g) => paged_attention(rope_append(q, k, v, ...), g)."""

    name: ClassVar[str] = "fuse-attention"
    after: ClassVar[tuple[str, ...]] = ("fuse-norm",)
    rules: ClassVar[list[Rule]] = ATTENTION

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """Rotary embedding first; transposes it leaves in pairs vanish; then attention around it."""
        context.note(self.name, rewrite(graph, DOUBLED + ROPE))
        cancel_transposes(graph)
        share_equal(graph)  # every layer made the same tables
        return super().run(graph, context)
