"""ONNX in: what was exported comes back and computes the same; standard nodes mean what onnxruntime says they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import qcn_compile as qcn
from qcn_compile.errors import IRError, ModelError
from qcn_compile.ir.graph import Graph, count
from qcn_compile.ir.interpret import run
from qcn_compile.ir.sample import sample_inputs, sample_weights
from qcn_compile.ir.text import parse_graph, print_graph
from qcn_compile.onnx import emit
from qcn_compile.onnx.read import Imported, read
from qcn_compile.onnx.rows import ROWS

ALL_ROWS = """graph @all(%ids: i32[T], %rows: i32[R], %x: f32[T,24]) {
  %w : f32[40,24] = weight() {name="embed", dtype=f32, shape=(40,24)}
  %e : f32[T,24] = embedding(%ids, %w)
  %c : f32[24] = constant() {dtype=f32, shape=(24,), values=(VALUES)}
  %a : f32[T,24] = add(%e, %x)
  %m : f32[T,24] = mul(%a, %c)
  %s : f32[T,24] = sub(%m, %x)
  %g : f32[T,24] = silu(%s)
  %sq : f32[T,24] = pow(%g) {exponent=2.0}
  %mean : f32[T,1] = mean(%sq) {axis=-1, keepdim=true}
  %eps : f32[T,1] = add_scalar(%mean) {value=1e-06}
  %r : f32[T,1] = rsqrt(%eps)
  %n : f32[T,24] = mul(%g, %r)
  %k : f32[T,24] = mul_scalar(%n) {value=0.5}
  %w2 : f32[32,24] = weight() {name="proj", dtype=f32, shape=(32,24)}
  %b2 : f32[32] = weight() {name="bias", dtype=f32, shape=(32,)}
  %l : f32[T,32] = linear(%k, %w2, %b2)
  %h : f32[T,4,8] = reshape(%l) {shape=(T,4,8)}
  %t : f32[4,T,8] = transpose(%h) {a=0, b=1}
  %u : f32[T,4,8] = transpose(%t) {a=0, b=1}
  %first : f32[T,4,3] = slice(%u) {axis=2, start=0, stop=3}
  %rest : f32[T,4,5] = slice(%u) {axis=2, start=3, stop=8}
  %neg : f32[T,4,5] = neg(%rest)
  %cat : f32[T,4,8] = concat(%neg, %first) {axis=2}
  %cos : f32[T,4,8] = cos(%cat)
  %sin : f32[T,4,8] = sin(%cat)
  %q : f32[T,4,8] = div(%sin, %cos)
  %ex : f32[T,4,8] = exp(%cos)
  %sp : f32[T,4,8] = softplus(%ex)
  %sg : f32[T,4,8] = sigmoid(%q)
  %both : f32[T,4,8] = mul(%sp, %sg)
  %flat : f32[T,32] = reshape(%both) {shape=(T,32)}
  %p : f32[T,32] = softmax(%flat) {axis=-1, dtype=f32}
  %v : f32[T,3], %i : i64[T,3] = topk(%p) {k=3}
  %sum : f32[T,1] = sum(%v) {axis=-1, keepdim=true}
  %norm : f32[T,3] = div(%v, %sum)
  %i32 : i32[T,3] = cast(%i) {dtype=i32}
  %f : f32[T,3] = cast(%i32) {dtype=f32}
  %o : f32[T,3] = add(%norm, %f)
  %one : f32[1,3] = constant() {dtype=f32, shape=(1,3), values=(1.0,2.0,3.0)}
  %wide : f32[5,3] = expand(%one) {shape=(5,3)}
  %last : f32[R,3] = gather_rows(%o, %rows)
  return %last, %wide
}
""".replace("VALUES", ",".join(["0.5,1.5,-2.0,0.25"] * 6))


def results(graph: Graph, weights: Any, like: Graph) -> list[torch.Tensor]:
    return run(graph, sample_inputs(like, 3), weights)


def test_every_exported_row_comes_back(tmp_path: Path) -> None:
    graph = parse_graph(ALL_ROWS)
    assert {op.name for op in graph.ops} == {*ROWS, "weight"}
    weights = sample_weights(graph)
    emit.write(graph, weights.__getitem__, tmp_path)
    found = read(tmp_path / emit.FILE)
    back = found.graph
    assert [str(v.type) for v in back.inputs] == ["i32[T]", "i32[R]", "f32[T,24]"]
    for want, have in zip(results(graph, weights.__getitem__, graph), results(back, found.weights.__getitem__, graph),
                          strict=True):
        assert torch.equal(want, have)
    assert count(back.ops)["silu"] == count(back.ops)["rsqrt"] == 1  # not sigmoid and mul, not sqrt and division
    assert print_graph(parse_graph(print_graph(back))) == print_graph(back)
    assert [str(op.loc) for op in back.ops if op.name == "softmax"] == ["p (model.onnx:Softmax)"]


def test_trace_takes_a_file(tmp_path: Path) -> None:
    graph = parse_graph(ALL_ROWS)
    emit.write(graph, sample_weights(graph).__getitem__, tmp_path)
    assert print_graph(qcn.trace(tmp_path / emit.FILE)) == print_graph(qcn.trace(str(tmp_path / emit.FILE)))


def _info(name: str, shape: list[Any] | None) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(folder: Path, nodes: list[Any], inputs: dict[str, list[Any]], output: str,
          tensors: dict[str, np.ndarray] | None = None, opset: int = 18) -> Path:
    made = helper.make_model(
        helper.make_graph(nodes, "made", [_info(k, v) for k, v in inputs.items()], [_info(output, None)],
                          [numpy_helper.from_array(a, k) for k, a in (tensors or {}).items()]),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("other", 1)], ir_version=8)
    file = folder / "made.onnx"
    onnx.save(made, str(file))
    return file


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def node(kind: str, inputs: str, outputs: str = "y", **attrs: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attrs)


W = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
NODES: dict[str, tuple[list[Any], dict[str, np.ndarray]]] = {
    "MatMul": ([node("MatMul", "x w")], {"w": W}),
    "Gemm": ([node("Gemm", "x w b")], {"w": W, "b": W[0]}),
    "Split": ([node("Split", "x n", "a b", axis=1), node("Concat", "b a", axis=-1)], {"n": ints(2, 4)}),
    "Split in equal parts": ([node("Split", "x", "a b", axis=1, num_outputs=2), node("Add", "a b")], {}),
    "Unsqueeze": ([node("Unsqueeze", "x n", "a"), node("Transpose", "a", "b", perm=[2, 0, 1]),
                   node("Squeeze", "b m")], {"n": ints(1), "m": ints(-1)}),
    "Reshape": ([node("Reshape", "x n")], {"n": ints(0, 2, -1)}),
    "Slice from the end": ([node("Slice", "x s e a")], {"s": ints(-4), "e": ints(-1), "a": ints(1)}),
    "Constant": ([node("Constant", "", "c", value_floats=[1.0, 2, 3, 4, 5, 6]), node("Sub", "x c")], {}),
    "Reciprocal": ([node("Exp", "x", "a"), node("Reciprocal", "a")], {}),
    "Silu": ([node("Sigmoid", "x", "a"), node("Mul", "a x")], {}),
    "Scaled": ([node("Mul", "x c", "a"), node("Div", "a d")],
               {"c": np.array(3, np.float32), "d": np.array([7], np.float32)}),
    "ReduceSum": ([node("ReduceSum", "x n", keepdims=0)], {"n": ints(1)}),
}


@pytest.mark.parametrize("name", NODES)
def test_nodes_mean_what_onnxruntime_computes(name: str, tmp_path: Path) -> None:
    nodes, tensors = NODES[name]
    file = model(tmp_path, nodes, {"x": ["seq_len", 6]}, "y", tensors)
    x = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
    (want,) = onnxruntime.InferenceSession(str(file)).run(None, {"x": x})
    found = read(file)
    assert str(found.graph.inputs[0].type) == "f32[SeqLen,6]"
    (have,) = run(found.graph, {"x": torch.from_numpy(x)}, found.weights.__getitem__)
    assert have.shape == want.shape
    np.testing.assert_allclose(have.numpy(), want, rtol=1e-5, atol=1e-6)


def test_a_norm_of_opset_23_is_a_row(tmp_path: Path) -> None:
    norm = node("RMSNormalization", "x w", epsilon=1e-6)
    file = model(tmp_path, [norm], {"x": ["N", 6]}, "y", {"w": W[:, 0]}, opset=23)
    assert [op.name for op in read(file).graph.ops] == ["constant", "rms_norm"]


@pytest.mark.parametrize(("bad", "message"), [
    (node("LSTM", "x", name="rnn", hidden_size=3),
     r"node 'rnn' \(LSTM\) has no row in the op table; rewrite it with Add, "),
    (node("Fancy", "x", name="f", domain="other"), r"node 'f' \(other:Fancy\) has no row"),
    (node("MatMul", "x cube", name="mm"),
     r"node 'mm' \(MatMul\): f32\[N,6\] times f32\[2,6,3\]; the op table multiplies with a matrix"),
    (node("Slice", "x zero one zero", name="cut"),
     r"node 'cut' \(Slice\): axis 0 of f32\[N,6\] has no fixed size; export it with that size fixed"),
    (node("Reshape", "x x", name="r"),
     r"node 'r' \(Reshape\): input 1 \(x\) is computed; export it with"),
    (node("Add", "x cube", name="sum"), r"node 'sum' \(Add\): shapes .* do not broadcast"),
])
def test_what_cannot_be_read_is_named(bad: Any, message: str, tmp_path: Path) -> None:
    tensors = {"cube": np.zeros((2, 6, 3), np.float32), "zero": ints(0), "one": ints(1)}
    with pytest.raises(IRError, match=r"made\.onnx: " + message):
        read(model(tmp_path, [bad], {"x": ["N", 6]}, "y", tensors))


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.onnx: no such file"):
        qcn.trace(tmp_path / "gone.onnx")
    (tmp_path / "bad.onnx").write_text("hello")
    with pytest.raises(ModelError, match=r"bad\.onnx cannot be read as ONNX"):
        qcn.trace(tmp_path / "bad.onnx")
    graph = parse_graph(ALL_ROWS)
    emit.write(graph, sample_weights(graph).__getitem__, tmp_path)
    (tmp_path / emit.DATA).unlink()
    with pytest.raises(ModelError, match="cannot be read as ONNX"):
        qcn.trace(tmp_path / emit.FILE)


def test_a_row_that_is_a_function_does_not_come_back(tmp_path: Path) -> None:
    text = """graph @main(%x: f32[T,16], %batch: batch) {
  state @conv.a : conv f32[16,3]
  %w : f32[16,4] = weight() {name="w", dtype=f32, shape=(16,4)}
  %y : f32[T,16] = causal_conv1d(%x, %w, none, %batch) {activation="silu", state=@conv.a}
  return %y
}
"""
    emit.write(parse_graph(text), lambda name: torch.zeros(16, 4), tmp_path)
    with pytest.raises(IRError, match=r"node 'y' \(qcn:causal_conv1d\) has no row in the op table"):
        read(tmp_path / emit.FILE)


def test_imported_is_data(tmp_path: Path) -> None:
    tensors = {"a/b:0": np.tile(W, 2), "unused": W}
    file = model(tmp_path, [node("MatMul", "x a/b:0")], {"x": ["N", 6]}, "y", tensors)
    found = read(file)
    assert isinstance(found, Imported)
    assert {name: tuple(t.shape) for name, t in found.weights.items()} == {"a_b_0": (6, 20)}
