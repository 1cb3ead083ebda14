"""The verifier: every pass leaves a graph for which this finds nothing."""

from __future__ import annotations

from typing import Any

from qcn_compile.errors import IRError
from qcn_compile.ir import ops as _rows  # noqa: F401  (fills the table)
from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.ir.optable import OpSpec, row
from qcn_compile.ir.text import format_op
from qcn_compile.ir.types import StateRef


def plain_attrs(attrs: dict[str, Any]) -> dict[str, Any]:
    """Attributes as references take them: a state by its name."""
    return {key: value.name if isinstance(value, StateRef) else value for key, value in attrs.items()}


def infer(name: str, operands: list[Value | None], attrs: dict[str, Any]) -> tuple[Any, ...]:
    """Result types of an op, by the shape rule of its row."""
    types = row(name).infer(*[None if v is None else v.type for v in operands], **plain_attrs(attrs))
    return types if isinstance(types, tuple) else (types,)


def verify(graph: Graph) -> None:
    """Raise IRError naming the op, its place and the rule it breaks."""
    defined: set[Value] = set(graph.inputs)
    names = {v.name for v in graph.inputs}
    for op in graph.ops:
        try:
            _check(op, graph, defined, names)
        except IRError as error:
            raise IRError(f"{error}\n  in @{graph.name}: {format_op(op)}") from None
        defined.update(op.results)
        names.update(v.name for v in op.results)
    for value in graph.outputs:
        if value not in defined:
            raise IRError(f"@{graph.name} returns %{value.name}, which nothing defines")


def _check(op: Op, graph: Graph, defined: set[Value], names: set[str]) -> None:
    spec = row(op.name)
    for value in op.inputs:
        if value not in defined:
            raise IRError(f"%{value.name} is used before it is defined")
    for value in op.results:
        if value.name in names or value.op is not op:
            raise IRError(f"%{value.name} is defined twice or not owned by its op")
    least, most = spec.arity()
    if len(op.operands) < least or (most is not None and len(op.operands) > most):
        raise IRError(f"{op.name} takes {', '.join(spec.operands)}: {len(op.operands)} operands given")
    _check_attrs(op, spec, graph)
    _check_types(op, spec)


def _check_attrs(op: Op, spec: OpSpec, graph: Graph) -> None:
    for key, want in spec.attrs.items():
        if key not in op.attrs:
            if want.required:
                raise IRError(f"{op.name} lacks attribute {key!r} ({want.type.__name__})")
            continue
        value = op.attrs[key]
        if want.required and not isinstance(value, want.type) and not (want.type is float and isinstance(value, int)):
            raise IRError(f"attribute {key}={value!r} of {op.name} is no {want.type.__name__}")
    for key, value in op.attrs.items():
        if key not in spec.attrs:
            raise IRError(f"{op.name} has no attribute {key!r}; it has {sorted(spec.attrs)}")
        if isinstance(value, StateRef) and value.name not in graph.states:
            raise IRError(f"{op.name} names state @{value.name}, which the graph does not declare")


def _check_types(op: Op, spec: OpSpec) -> None:
    for name, value in zip(spec.operands, op.operands, strict=False):
        if value is None and not name.endswith("?"):
            raise IRError(f"operand {name} of {op.name} is missing")
    try:
        want = infer(op.name, op.operands, op.attrs)
    except (IndexError, AttributeError, TypeError, ValueError) as error:
        raise IRError(f"operands do not fit {op.name}: {error}") from None
    have = tuple(v.type for v in op.results)
    if [str(t) for t in want] != [str(t) for t in have]:
        raise IRError(f"{op.name} yields {', '.join(map(str, want))}, declared {', '.join(map(str, have))}")


