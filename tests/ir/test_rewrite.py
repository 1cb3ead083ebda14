"""The rule language: commutation, wildcards, captures, several results, why-not reports."""

from __future__ import annotations

import pytest

from qcn_compile.errors import IRError
from qcn_compile.ir.rewrite import Rule, rewrite
from qcn_compile.ir.text import parse_graph, print_graph
from qcn_compile.ir.verify import verify


def graph(body: str, inputs: str = "%x: f32[T,4], %y: f32[T,4]", outputs: str = "%o"):
    return parse_graph(f"graph @g({inputs}) {{\n{body}\n  return {outputs}\n}}\n")


def test_commutative_either_way() -> None:
    for args in ("%1, %y", "%y, %1"):
        g = graph(f"%1 : f32[T,4] = silu(%x)\n%o : f32[T,4] = mul({args})")
        rewrite(g, [Rule("r", "mul(silu(a), b) => silu_mul(a, b)")])
        verify(g)
        assert "silu_mul(%x, %y)" in print_graph(g)


def test_same_variable_must_be_the_same_value() -> None:
    g = graph("%1 : f32[T,4] = silu(%x)\n%o : f32[T,4] = mul(%1, %y)")
    log = rewrite(g, [Rule("square", "mul(silu(a), a) => silu_mul(a, a)", marker="silu")])
    assert "silu_mul" not in print_graph(g)
    assert "a is %x in one place and %y in another" in log[0].reason


def test_captured_attribute_travels() -> None:
    g = graph("%1 : f32[T,4] = add_scalar(%x) {value=0.25}\n%o : f32[T,4] = neg(%1)")
    rewrite(g, [Rule("r", "neg(add_scalar(a){value=$v}) => mul_scalar(a){value=$v}")])
    assert "mul_scalar(%x) {value=0.25}" in print_graph(g)


def test_inner_value_is_replaced_too() -> None:
    g = graph("%1 : f32[T,4] = add(%x, %y)\n%w : f32[4] = weight() {name=\"w\", dtype=f32, shape=(4,)}\n"
              "%2 : f32[T,4] = rms_norm(%1, %w) {eps=1e-06}\n%o : f32[T,4] = mul(%2, %1)")
    rewrite(g, [Rule("r", "rms_norm(s:add(x, r), w){eps=$e} => t.1; s <- t.0 where t = add_rms_norm(x, r, w){eps=$e}")])
    verify(g)
    assert "= add(" not in print_graph(g)


def test_single_reader_is_demanded_and_reported() -> None:
    g = graph("%1 : f32[T,4] = silu(%x)\n%2 : f32[T,4] = mul(%1, %y)\n%o : f32[T,4] = add(%2, %1)")
    log = rewrite(g, [Rule("r", "mul(s:silu(a), b) => silu_mul(a, b)", single=("s",), marker="silu")])
    assert "silu_mul" not in print_graph(g)
    assert "%1 has another reader" in log[0].reason


def test_absorbed_effects_disappear() -> None:
    g = graph('%w : f32[4,3] = weight() {name="w", dtype=f32, shape=(4,3)}\n'
              "%1 : f32[T,4] = causal_conv1d(%x, %w, none, %b) {state=none}\n%o : f32[T,4] = silu(%1)",
              "%x: f32[T,4], %b: batch")
    rewrite(g, [Rule("r", 'silu(causal_conv1d(x, w, none, b)) => causal_conv1d(x, w, none, b){activation="silu"}')])
    verify(g)
    assert [op.name for op in g.ops] == ["weight", "causal_conv1d"]


def test_bad_rules_are_refused() -> None:
    g = graph("%o : f32[T,4] = silu(%x)")
    with pytest.raises(IRError, match="needs '=>'"):
        rewrite(g, [Rule("r", "silu(x)")])
    with pytest.raises(IRError, match="zz is not bound on the left"):
        rewrite(g, [Rule("r", "silu(x) => neg(zz)")])
    with pytest.raises(IRError, match="cannot read pattern"):
        rewrite(g, [Rule("r", "silu(x)# => neg(x)")])
