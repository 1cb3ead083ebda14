"""From a graph to model.onnx, model.onnx.data and the tokenizer's files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qcn_compile.artifact import building
from qcn_compile.errors import LoweringError, ModelError
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.graph import Graph, Op
from qcn_compile.ir.interpret import Weights
from qcn_compile.ir.optable import row
from qcn_compile.ir.types import DType, StateKind, StateRef, StateType, TensorType
from qcn_compile.onnx.bodies import BODIES, Body
from qcn_compile.onnx.builder import DOMAIN, Builder, Nodes, info, save
from qcn_compile.onnx.fold import evaluate, folded
from qcn_compile.onnx.mixers import MIXERS
from qcn_compile.onnx.rows import ROWS

if TYPE_CHECKING:
    from qcn_compile.compile import Options

FILE, DATA = "model.onnx", "model.onnx.data"
OUTPUTS = ("logits", "hidden")
States = dict[str, list[str]]


def emit(model: str | None, output: Path, options: Options | None = None, force: bool = False) -> Path:
    """Write a checkpoint as ONNX into a new folder: as traced, or with `options` as the passes leave it.

    Raises a QcnError naming what cannot be written.
    """
    from qcn_compile.compile import optimise
    from qcn_compile.write import TOKENIZER_FILES

    traced = trace_model(locate(model, "cpu"), DType.f32)
    if traced.weights is None or traced.path is None:
        raise ModelError(f"{traced.name}: no weights found; ONNX needs them: name a checkpoint directory with --model")
    graph = traced.main if options is None else optimise(traced, options)
    with building(output, force) as folder:
        write(graph, traced.weights.get, folder)
        for name in TOKENIZER_FILES:
            if (traced.path / name).is_file():
                shutil.copyfile(traced.path / name, folder / name)
    return output


def write(graph: Graph, weights: Weights, folder: Path) -> None:
    """One sequence: tokens, positions i32 [T] and past states in; logits [T, V], hidden [T, H] and present states out.

    Logits are [R, V] for the rows i32 [R] of a graph that takes them. States `past.NAME...` of a new sequence: kv of
    length 0, conv and delta zeros. Feed `present.NAME...` back. What depends on weights alone is computed now.
    """
    ready, wanted = folded(graph)
    with (folder / DATA).open("wb") as data:
        b = Builder(data, DATA)
        past = {name: _past(b, name, state) for name, state in graph.states.items()}
        current = dict(past)
        for value in graph.inputs:
            if isinstance(value.type, TensorType):
                b.inputs.append(info(value.name, value.tensor))
        for op in graph.ops:
            if op not in ready:
                _op(b, op, current)
            for value in op.results:
                if value in wanted:
                    b.weight(value.name, evaluate(value, weights))
        for name, value in zip(OUTPUTS, graph.outputs, strict=False):
            b.node("Identity", value.name, outputs=[name])
            b.outputs.append(info(name, value.tensor))
        for name, state in graph.states.items():
            _present(b, name, state, current[name])
    save(b.model(graph.name), folder / FILE)


def _op(b: Builder, op: Op, current: States) -> None:
    """One op: in place, or a call of the function that its row became."""
    ins, outs = ["" if v is None else v.name for v in op.operands], [v.name for v in op.results]
    if op.name in ROWS:
        ROWS[op.name](b, op, ins, outs)
        return
    body = {**BODIES, **MIXERS}.get(op.name)
    if body is None:
        raise LoweringError(f"{op.name} at {op.loc} has no ONNX form; there are "
                            f"{', '.join(sorted({*ROWS, *BODIES, *MIXERS}))}: stop before the pass that makes it, "
                            "with --stop-after")
    tensors = [name for name, v in zip(ins, op.operands, strict=True) if v is None or isinstance(v.type, TensorType)]
    for key, effect in row(op.name).effects.items():
        state = op.attrs.get(key)
        if not isinstance(state, StateRef):
            raise LoweringError(f"{op.name} at {op.loc} names no cache; ONNX needs the graph of a whole model")
        tensors += current[state.name]
        if "w" in effect:
            current[state.name] = [b.name(f"{outs[0]}.{key}") for _ in current[state.name]]
            outs += current[state.name]
    _call(b, op, body, tensors, outs)


def _call(b: Builder, op: Op, body: Body, ins: list[str], outs: list[str]) -> None:
    """A node of the function for these attributes and operand types; absent operands are no inputs."""
    attrs = {k: v for k, v in op.attrs.items() if not isinstance(v, StateRef)}
    given = [name for name in ins if name]

    def write(inside: Nodes, names: list[str], results: list[str]) -> None:
        rest = iter(names)
        body(inside, op, [next(rest) if name else "" for name in ins], results)

    key = (op.name, *sorted(attrs.items()), *(v and str(v.type) for v in op.operands))
    doc = f"{', '.join(f'{k}={v}' for k, v in attrs.items())}\n{row(op.name).doc}".strip()
    name = b.function(key, op.name, doc, (len(given), len(outs)), write)
    b.node(name, *given, outputs=outs, domain=DOMAIN)


def parts(name: str, state: StateType) -> dict[str, tuple[int | str, ...]]:
    """Name and shape of each tensor of a state; "P" stands for the tokens so far."""
    if state.kind is StateKind.kv:
        heads, dim = state.shape
        return {f"{name}.{part}": (1, heads, "P", dim) for part in ("k", "v")}
    return {name: (1, *state.shape)}


def _past(b: Builder, name: str, state: StateType) -> list[str]:
    return [_declare(b.inputs, f"past.{part}", state, shape) for part, shape in parts(name, state).items()]


def _present(b: Builder, name: str, state: StateType, values: list[str]) -> None:
    for (part, shape), value in zip(parts(name, state).items(), values, strict=True):
        grown = tuple("P+T" if size == "P" else size for size in shape)
        b.node("Identity", value, outputs=[_declare(b.outputs, f"present.{part}", state, grown)])


def _declare(into: list[object], name: str, state: StateType, shape: tuple[int | str, ...]) -> str:
    into.append(info(name, TensorType(state.dtype, ()), *shape))
    return name
