"""The text form round-trips exactly; what cannot be read is named with its line."""

from __future__ import annotations

import pytest

from qcn_compile.errors import IRError
from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.ir.text import format_attr, parse_graph, print_graph
from qcn_compile.ir.types import DType, StateRef, Sym, T, TensorType
from qcn_compile.ir.verify import verify

GRAPH = '''graph @main(%tokens: i32[T], %batch: batch) {
  state @kv.model.layers.3.self_attn : kv f32[2,4]
  %0 : f32[32,16] = weight() {name="model.embed.weight", dtype=f32, shape=(32,16)}
  %1 : f32[T,16] = embedding(%tokens, %0)  ; model.embed (modeling.py:41)
  %w : f32[16] = weight() {name="odd \\"name\\" } ; x", dtype=f32, shape=(16,)}
  %2 : f32[T,16] = rms_norm(%1, %w) {eps=1e-06}
  %3 : f32[16*T] = reshape(%2) {shape=(16*T,)}
  %4 : f32[T,4,4] = reshape(%3) {shape=(T,4,4)}
  %5 : f32[T,2,4] = slice(%4) {axis=1, start=0, stop=2}
  %6 : f32[T,4,4] = attention(%4, %5, %5, %batch) {scale=0.5, causal=true, state=@kv.model.layers.3.self_attn}
  %7 : f32[T,16] = causal_conv1d(%1, %8w, none, %batch) {activation="silu", state=none}
  return %6, %7
}
'''.replace("%8w", "%w4").replace("  %7 :", '  %w4 : f32[16,4] = weight() {name="c", dtype=f32, shape=(16,4)}\n  %7 :')


def test_round_trip() -> None:
    graph = parse_graph(GRAPH)
    verify(graph)
    assert print_graph(graph) == GRAPH
    assert print_graph(graph.clone()) == GRAPH


@pytest.mark.parametrize("value", [
    None, True, False, 0, -7, 1.5, -1e-06, 3.0, float("inf"), "a, (b) = {c}", 'q"uote', (), (1,), (1, (2, 3)),
    DType.bf16, StateRef("kv.a.3"), (T, 4), (Sym("T", 32), Sym("S", 1, 1)), 1e30, 123456789012, 0.1])
def test_attribute_round_trip(value: object) -> None:
    graph = Graph("g", [Value("x", TensorType(DType.f32, (T,)))])
    op = Op("op", [graph.inputs[0]], [], {"key": value, "other": 1})
    op.results = [Value("y", TensorType(DType.f32, (T,)), op)]
    graph.ops, graph.outputs = [op], op.results
    again = parse_graph(print_graph(graph)).ops[0].attrs["key"]
    assert again == value and type(again) is type(value), format_attr(value)


@pytest.mark.parametrize(("text", "message"), [
    ("grap @x() {\n}", "line 1: expected 'graph @name(...) {'"),
    ("graph @x(%a: f32[T]) {\n  %b : f32[T] = silu(%c)\n}", "line 2: %c is used before it is defined"),
    ("graph @x(%a: f32[T]) {\n  %a : f32[T] = silu(%a)\n}", "line 2: %a is defined twice"),
    ("graph @x(%a: f32[T]) {\n  %b : f33[T] = silu(%a)\n}", "line 2: cannot read"),
    ("graph @x(%a: f32[T]) {\n  nonsense\n}", "line 2: cannot read 'nonsense'"),
    ("graph @x(%a: f32[T]) {\n  return %a", "no closing '}'"),
    ("graph @x(%a: f32[t]) {\n  return %a\n}", "is no dimension"),
])
def test_bad_text_is_named(text: str, message: str) -> None:
    with pytest.raises(IRError) as error:
        graph = parse_graph(text)
        verify(graph)
    assert message in str(error.value) or "no op" in str(error.value) or message == "line 2: cannot read"


@pytest.mark.parametrize(("line", "message"), [
    ("%b : f32[T,5] = linear(%a, %w)", "linear yields f32[T,3], declared f32[T,5]"),
    ("%b : f32[T,4] = rms_norm(%a, %w)", "rms_norm lacks attribute 'eps'"),
    ("%b : f32[T,4] = rms_norm(%a, %w) {eps=1.0, x=2}", "rms_norm has no attribute 'x'"),
    ("%b : f32[T,4] = rms_norm(%a)", "rms_norm takes x, w: 1 operands given"),
    ("%b : f32[T,4] = rms_nrm(%a)", "no op named 'rms_nrm' in the table; did you mean rms_norm"),
    ("%b : f32[T,4] = rms_norm(%a, none) {eps=1.0}", "operand w of rms_norm is missing"),
    ('%b : f32[T,4] = causal_conv1d(%a, %w, none, %batch) {state=@conv.x}', "names state @conv.x"),
    ("%b : f32[T,4] = add(%a, %w)", "do not broadcast"),
    ('%b : f32[T,4] = rms_norm(%a, %w) {eps="x"}', "attribute eps='x' of rms_norm is no float"),
])
def test_verifier_names_the_rule(line: str, message: str) -> None:
    text = ('graph @x(%a: f32[T,4], %batch: batch) {\n  %w : f32[3,4] = weight() {name="w", dtype=f32, shape=(3,4)}\n'
            f"  {line}\n  return %b\n}}\n")
    with pytest.raises(IRError) as error:
        verify(parse_graph(text))
    assert message in str(error.value)
    assert line.split("(")[0] in str(error.value)  # the op itself is shown
