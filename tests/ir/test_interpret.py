"""Properties of the references: caches, chunking and batching change nothing; ragged neighbours do not leak."""

from __future__ import annotations

import pytest
import torch

from qcn_compile.errors import IRError
from qcn_compile.ir.batch import Batch, Caches
from qcn_compile.ir.interpret import default_inputs, run
from qcn_compile.ir.text import parse_graph

MIXER = '''graph @main(%qkv: f32[T,16], %z: f32[T,8], %b: f32[T,4], %a: f32[T,4], %batch: batch) {
  state @conv.0 : conv f32[16,3]
  state @delta.0 : delta f32[4,2,2]
  %cw : f32[16,4] = weight() {name="conv", dtype=f32, shape=(16,4)}
  %d : f32[4] = weight() {name="decay", dtype=f32, shape=(4,)}
  %t : f32[4] = weight() {name="dt", dtype=f32, shape=(4,)}
  %n : f32[2] = weight() {name="norm", dtype=f32, shape=(2,)}
  %y : f32[T,8] = delta_net(%qkv, %z, %b, %a, %cw, %d, %t, %n, %batch) {ATTRS}
  return %y
}
'''.replace("ATTRS", "key_heads=2, value_heads=4, key_dim=2, value_dim=2, eps=1e-06, conv=@conv.0, delta=@delta.0")
ATTEND = '''graph @main(%q: f32[T,4,4], %k: f32[T,2,4], %v: f32[T,2,4], %positions: i32[T], %batch: batch) {
  state @kv.0 : kv f32[2,4]
  %f : f32[1] = constant() {dtype=f32, shape=(1,), values=(0.5,)}
  %c : f32[T,1], %s : f32[T,1] = rope_table(%positions, %f) {scaling=1.0}
  %w : f32[4] = weight() {name="w", dtype=f32, shape=(4,)}
  %r : f32[T,4,4] = rope_append(%q, %k, %v, %w, none, %c, %s, %batch) {eps=1e-06, state=@kv.0}
  %y : f32[T,16] = paged_attention(%r, none, %batch) {scale=0.5, state=@kv.0}
  return %y
}
'''


def weights(graph):
    torch.manual_seed(1)
    table = {op.attrs["name"]: torch.randn(op.attrs["shape"]) for op in graph.ops if op.name == "weight"}
    table["decay"] = -table["decay"].abs() if "decay" in table else None
    return table.__getitem__


def inputs(graph, total):
    torch.manual_seed(2)
    return {v.name: torch.randn([total if not isinstance(d, int) else d for d in v.type.shape])
            for v in graph.inputs if v.name not in ("batch", "positions")}


@pytest.mark.parametrize("text", [MIXER, ATTEND], ids=["delta_net", "attention"])
@pytest.mark.parametrize("chunks", [[7], [3, 4], [1] * 7, [6, 1], [2, 2, 3]])
def test_chunks_and_neighbours_change_nothing(text: str, chunks: list[int]) -> None:
    """One sequence of 7 in chunks, each chunk batched with a stranger of other length, equals one pass alone."""
    graph = parse_graph(text)
    source, stranger = inputs(graph, 7), {k: v + 1 for k, v in inputs(graph, 7).items()}
    whole = run(graph, {**source, "positions": torch.arange(7), "batch": Batch.fresh([7])}, weights(graph))[0]
    caches = Caches(graph.states, slots=3, pages=9, page_size=2)
    done, parts = 0, []
    for n in chunks:
        batch = Batch([0, 2, 2 + n], [0, done], [2, 1], [[8], [3, 0, 5, 1]], caches)
        mixed = {k: torch.cat([stranger[k][:2], source[k][done:done + n]]) for k in source}
        positions = torch.cat([torch.arange(2), done + torch.arange(n)])
        parts.append(run(graph, {**mixed, "positions": positions, "batch": batch}, weights(graph))[0][2:])
        done += n
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)


def test_missing_input_is_named() -> None:
    graph = parse_graph(ATTEND)
    with pytest.raises(IRError, match="input %q of @main was not given"):
        run(graph, {}, weights(graph))


def test_failure_names_the_op() -> None:
    graph = parse_graph("graph @g(%a: f32[T,4]) {\n  %b : f32[T,4] = silu(%a)  ; model.act (m.py:1)\n  return %b\n}")
    with pytest.raises(IRError, match=r"while interpreting %b .* model.act"):
        run(graph, {"a": "no tensor"})


def test_default_inputs_cover_the_graph() -> None:
    graph = parse_graph("graph @g(%tokens: i32[T], %positions: i32[T], %batch: batch) {\n  return %tokens\n}")
    values = default_inputs(graph, [[5, 6], [7]])
    assert values["tokens"].tolist() == [5, 6, 7]
    assert values["positions"].tolist() == [0, 1, 0]
    assert values["batch"].cu_seqlens == [0, 2, 3]
