"""From a traced graph to model.onnx, model.onnx.data and the tokenizer's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from qcn_compile.artifact import building
from qcn_compile.errors import LoweringError, ModelError
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.graph import Graph, Op
from qcn_compile.ir.types import StateKind, StateRef, StateType, TensorType
from qcn_compile.onnx.builder import Builder, info, save
from qcn_compile.onnx.mixers import MIXERS
from qcn_compile.onnx.rows import ROWS

FILE, DATA = "model.onnx", "model.onnx.data"
OUTPUTS = ("logits", "hidden")


def emit(model: str | None, output: Path, force: bool = False) -> Path:
    """Write a checkpoint as ONNX into a new folder. Raises a QcnError naming what cannot be written."""
    from qcn_compile.compile import TOKENIZER_FILES
    from qcn_compile.ir.types import DType

    located = locate(model, "cpu")
    traced = trace_model(located, DType.f32)
    if traced.weights is None or traced.path is None:
        raise ModelError(f"{located.name}: {located.note or 'no weights found'}; --emit onnx needs them")
    with building(output, force) as folder:
        write(traced.main, traced.weights.get, folder)
        for name in TOKENIZER_FILES:
            if (traced.path / name).is_file():
                shutil.copyfile(traced.path / name, folder / name)
    return output


def write(graph: Graph, weights: Callable[[str], Tensor], folder: Path) -> None:
    """One sequence: tokens, positions i32 [T] and past states in; logits [T, V], hidden [T, H] and present states out.

    States `past.NAME...` of a new sequence: kv of length 0, conv and delta zeros. Feed `present.NAME...` back.
    """
    with (folder / DATA).open("wb") as data:
        b = Builder(data, DATA)
        past = {name: _past(b, name, state) for name, state in graph.states.items()}
        present: dict[str, list[str]] = {}
        for value in graph.inputs:
            if isinstance(value.type, TensorType):
                b.inputs.append(info(value.name, value.tensor))
        for op in graph.ops:
            _op(b, op, weights, past, present)
        for name, value in zip(OUTPUTS, graph.outputs, strict=False):
            b.node("Identity", value.name, outputs=[name])
            b.outputs.append(info(name, value.tensor))
        for name, state in graph.states.items():
            _present(b, name, state, present.get(name, past[name]))
    save(b.model(graph.name), folder / FILE)


def _op(b: Builder, op: Op, weights: Callable[[str], Tensor], past: dict[str, list[str]],
        present: dict[str, list[str]]) -> None:
    ins, outs = [v.name for v in op.inputs], [v.name for v in op.results]
    if op.name == "weight":
        b.weight(outs[0], weights(str(op.attrs["name"])))
    elif op.name in MIXERS:
        state = op.attrs.get("state")
        if not isinstance(state, StateRef):
            raise LoweringError(f"{op.name} at {op.loc} names no cache; ONNX needs the graph of a whole model")
        plain = [v.name for v in op.inputs if isinstance(v.type, TensorType)]
        present[state.name] = MIXERS[op.name](b, op, plain, outs, past[state.name])
    elif op.name in ROWS:
        ROWS[op.name](b, op, ins, outs)
    else:
        raise LoweringError(f"{op.name} at {op.loc} has no ONNX form; there are "
                            f"{', '.join(sorted({*ROWS, *MIXERS}))}: emit the graph before fusion")


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
