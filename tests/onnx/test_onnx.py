"""The bundled model as ONNX, step by step in onnxruntime: logits and greedy text as the interpreter has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
import onnx
import onnxruntime

from qcn_compile.errors import LoweringError
from qcn_compile.frontend import Traced, trace_model
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.interpret import default_inputs, run
from qcn_compile.ir.text import parse_graph
from qcn_compile.onnx import emit

PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def traced() -> Traced:
    return trace_model(locate(None, "cpu"))


@pytest.fixture(scope="module")
def folder(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("onnx")
    emit.write(traced.main, traced.weights.get, made)
    return made


class Sequence:
    """One sequence: feeds tokens and keeps the states."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(folder / emit.FILE), options)
        self.states = {i.name: np.zeros([0 if d == "P" else d for d in i.shape], np.float32)
                       for i in self.session.get_inputs() if i.name.startswith("past.")}
        self.length = 0

    def step(self, tokens: list[int]) -> np.ndarray:
        positions = np.arange(self.length, self.length + len(tokens), dtype=np.int32)
        names = [o.name for o in self.session.get_outputs()]
        values = self.session.run(names, {"tokens": np.array(tokens, np.int32), "positions": positions, **self.states})
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
    assert {node.domain for node in model.graph.node} == {""}


def test_an_op_without_onnx_form_is_named(tmp_path: Path) -> None:
    graph = parse_graph("graph @main(%x: f32[T,4]) {\n  %1 : f32[T,4] = silu_mul(%x, %x)  ; here (a.py:1)\n"
                        "  return %1\n}\n")
    with pytest.raises(LoweringError, match=r"silu_mul at here \(a.py:1\) has no ONNX form"):
        emit.write(graph, lambda name: None, tmp_path)
