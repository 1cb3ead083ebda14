"""The bundled model as ONNX, step by step in onnxruntime: logits and greedy text as the interpreter has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
import onnx
import onnxruntime

from qcn_compile.cli import main
from qcn_compile.compile import Options, optimise
from qcn_compile.errors import LoweringError
from qcn_compile.frontend import Traced
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.batch import Batch
from qcn_compile.ir.interpret import default_inputs, run
from qcn_compile.ir.optable import TABLE
from qcn_compile.ir.sample import sample_inputs
from qcn_compile.ir.text import parse_graph
from qcn_compile.onnx import emit
from qcn_compile.onnx.bodies import BODIES
from qcn_compile.onnx.mixers import MIXERS
from qcn_compile.onnx.rows import ROWS
from tests import sharing

PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def traced() -> Traced:
    return sharing.traced(locate(None, "cpu"))


@pytest.fixture(scope="module", params=["unfused", "fused"])
def folder(request: pytest.FixtureRequest, traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    options = Options(dtype="fp32", quant="none")
    emit.write(traced.main if request.param == "unfused" else optimise(traced, options), traced.weights.get, made)
    return made


class Sequence:
    """One sequence: feeds tokens and keeps the states."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(folder / emit.FILE), options)
        self.states = {i.name: np.zeros([0 if d == "P" else d for d in i.shape], np.float32)
                       for i in self.session.get_inputs() if i.name.startswith("past.")}
        self.takes_rows = any(i.name == "rows" for i in self.session.get_inputs())
        self.length = 0

    def step(self, tokens: list[int]) -> np.ndarray:
        positions = np.arange(self.length, self.length + len(tokens), dtype=np.int32)
        names = [o.name for o in self.session.get_outputs()]
        rows = {"rows": np.arange(len(tokens), dtype=np.int32)} if self.takes_rows else {}
        values = self.session.run(names, {"tokens": np.array(tokens, np.int32), "positions": positions, **rows,
                                          **self.states})
        found: dict[str, Any] = dict(zip(names, values, strict=True))
        self.states = {name: found[name.replace("past.", "present.", 1)] for name in self.states}
        self.length += len(tokens)
        return found["logits"]


def expected(traced: Traced, tokens: list[int]) -> np.ndarray:
    return run(traced.main, default_inputs(traced.main, [tokens]), traced.weights.get)[0].numpy()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b))


def test_chunks_of_any_length_give_the_same_logits(folder: Path, traced: Traced) -> None:
    tokens = list(np.random.default_rng(0).integers(0, 4096, 13))
    sequence = Sequence(folder)
    have = np.concatenate([sequence.step(part) for part in (tokens[:2], tokens[2:3], tokens[3:10], tokens[10:])])
    assert close(have, expected(traced, tokens))


def test_greedy_text_matches(folder: Path, traced: Traced) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(traced.path / "tokenizer.json"))
    tokens = tokenizer.encode(PROMPT).ids
    sequence, made, want = Sequence(folder), list(tokens), list(tokens)
    logits = sequence.step(tokens)
    for _ in range(16):
        made.append(int(logits[-1].argmax()))
        logits = sequence.step(made[-1:])
        want.append(int(expected(traced, want)[-1].argmax()))
    assert tokenizer.decode(made) == tokenizer.decode(want)
    assert made == want


def test_sizes_are_symbolic_and_weights_external(folder: Path) -> None:
    model = onnx.load(str(folder / emit.FILE), load_external_data=False)
    assert (folder / emit.FILE).stat().st_size < 1 << 20
    assert (folder / emit.DATA).stat().st_size > 40 << 20
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert shapes["tokens"] == ["T"]
    assert shapes["past.kv.model.layers.3.self_attn.k"] == [1, 2, "P", 64]
    assert shapes["past.delta.model.layers.0.linear_attn"] == [1, 8, 32, 32]


def kinds(nodes: Any) -> set[tuple[str, str]]:
    """Domain and kind of every node, those of subgraphs included."""
    found = set()
    for node in nodes:
        found.add((node.domain, node.op_type))
        for attribute in node.attribute:
            found |= kinds(attribute.g.node)
    return found


def test_custom_ops_are_functions_of_standard_ops(folder: Path) -> None:
    model = onnx.load(str(folder / emit.FILE), load_external_data=False)
    called = {kind for domain, kind in kinds(model.graph.node) if domain == "qcn"}
    assert called == {f.name for f in model.functions}  # one for each attributes and sizes, shared by all layers
    rows = {name.partition(".")[0] for name in called}
    assert rows == ({"attention", "causal_conv1d", "gated_delta_rule", "moe_experts"} if "unfused" in folder.name else
                    {"rms_norm", "delta_net", "moe_add", "moe_route", "rope_table", "rope_append", "paged_attention",
                     "linear_add"})
    assert len(model.functions) <= len(rows) + 2
    for function in model.functions:
        assert all(domain == "" and onnx.defs.has(kind) for domain, kind in kinds(function.node))
        assert TABLE[function.name.partition(".")[0]].doc in function.doc_string


OTHERS = """graph @main(%x: f32[T,8], %r: f32[T,8], %w: f32[8], %l: f32[T,5], %q: f32[T,4,6], %k: f32[T,2,6], \
%v: f32[T,2,6], %p: i32[T], %f: f32[2], %a: f32[T,3], %d: f32[3], %batch: batch) {
  state @kv.a : kv f32[2,6]
  %n : f32[T,8] = rms_norm(%x, %w) {eps=1e-05}
  %s : f32[T,8], %y : f32[T,8] = add_rms_norm(%n, %r, %w) {eps=1e-06}
  %z : f32[T,8] = gated_rms_norm(%s, %y, %w) {eps=1e-06}
  %u : f32[T,8] = silu_mul(%z, %x)
  %m : f32[T,8] = mul_sigmoid(%u, %r)
  %g : f32[T,3] = delta_gate(%a, %d, %d)
  %i1 : i32[T,2], %w1 : f32[T,2] = moe_route(%l) {top_k=2, normalize=false, shared=false}
  %i2 : i32[T,3], %w2 : f32[T,3] = moe_route(%l) {top_k=2, normalize=true, shared=true}
  %cos : f32[T,2], %sin : f32[T,2] = rope_table(%p, %f) {scaling=1.5}
  %t : f32[T,4,6] = rope(%q, %cos, %sin)
  %qr : f32[T,4,6] = rope_append(%t, %k, %v, none, none, %cos, %sin, %batch) {eps=1e-06, state=@kv.a}
  %o : f32[T,24] = paged_attention(%qr, none, %batch) {scale=0.4, state=@kv.a}
  return %m, %g, %i1, %w1, %i2, %w2, %o
}
"""


def test_rows_that_these_graphs_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = parse_graph(OTHERS)
    monkeypatch.setattr(emit, "OUTPUTS", tuple(f"out.{v.name}" for v in graph.outputs))
    emit.write(graph, lambda name: None, tmp_path)
    given = sample_inputs(graph) | {"batch": Batch.fresh([8])}
    feed = {v.name: given[v.name].numpy() for v in graph.inputs if v.name != "batch"}
    feed |= {f"past.kv.a.{part}": np.zeros((1, 2, 0, 6), np.float32) for part in "kv"}
    session = onnxruntime.InferenceSession(str(tmp_path / emit.FILE))
    for value, want, have in zip(graph.outputs, run(graph, given), session.run(list(emit.OUTPUTS), feed), strict=True):
        np.testing.assert_allclose(have, want.numpy(), rtol=1e-5, atol=1e-6, err_msg=value.name)


def test_every_row_has_an_onnx_form() -> None:
    ours = {name for name, row in TABLE.items() if (row.reference.__module__ or "").startswith("qcn_compile.ir.ops")}
    on_weights = {"weight", "encode", "take_rows"}
    of_ranks = {"all_reduce", "all_gather", "local_experts", "send", "recv"}
    assert ours - {*ROWS, *BODIES, *MIXERS} == on_weights | of_ranks


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], traced: Traced,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a pass, weights as they remain after quantisation."""
    monkeypatch.setattr(emit, "trace_model", lambda located, dtype: traced)
    for flags, lacking in ((["--stop-after", "fuse-norm"], "delta_net"), (["--quant", "int4"], "rms_norm_none")):
        out = tmp_path / lacking
        assert main(["--emit", "onnx-fused", *flags, "-o", str(out)]) == 0
        names = {f.name.partition(".")[0] for f in onnx.load(str(out / emit.FILE), load_external_data=False).functions}
        assert "rms_norm" in names and lacking not in names
    sequence, tokens = Sequence(out), [5, 6, 7, 8]
    graph = optimise(traced, Options(dtype="fp32", quant="int4", activations="fp32"))
    want = run(graph, default_inputs(graph, [tokens]), traced.weights.get)[0].numpy()
    assert close(sequence.step(tokens), want) and not close(want, expected(traced, tokens))
    assert main(["--emit", "onnx", "--stop-after", "fuse-norm", "-o", str(tmp_path / "x")]) == 2
    assert "use --emit onnx-fused" in capsys.readouterr().err


def test_an_op_without_onnx_form_is_named(tmp_path: Path) -> None:
    graph = parse_graph("graph @main(%x: f32[T,4]) {\n  %1 : f32[T,4] = all_reduce(%x) {ranks=2}  ; here (a.py:1)\n"
                        "  return %1\n}\n")
    with pytest.raises(LoweringError, match=r"all_reduce at here \(a.py:1\) has no ONNX form"):
        emit.write(graph, lambda name: None, tmp_path)
