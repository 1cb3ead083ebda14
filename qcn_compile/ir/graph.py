"""The graph: one op type, an ordered SSA list, explicit states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qcn_compile.ir.types import BatchType, DType, StateRef, StateType, TensorType, Type

Attr = None | bool | int | float | str | DType | StateRef | tuple["Attr", ...]


@dataclass(frozen=True)
class Location:
    """Where an op came from: module path in the traced model and its source (file:line)."""

    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        return self.module + (f" ({self.source})" if self.source else "")


@dataclass(eq=False)
class Value:
    """An SSA value of a type: defined once, by an op or as a graph input (then `op` is None). Its name is unique."""

    name: str
    type: Type
    op: Op | None = None

    @property
    def tensor(self) -> TensorType:
        """The type, when the value is known to be a tensor."""
        if not isinstance(self.type, TensorType):
            raise TypeError(f"%{self.name} is a {self.type}, not a tensor")
        return self.type

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


@dataclass(eq=False)
class Op:
    """One operation: a row of the op table, by name, applied to operands. An absent optional operand is None.

    results: the values it defines. attrs: by name, typed as the row says. loc: where it came from.
    """

    name: str
    operands: list[Value | None]
    results: list[Value]
    attrs: dict[str, Attr] = field(default_factory=dict)
    loc: Location = Location()

    @property
    def result(self) -> Value:
        """The only result."""
        (only,) = self.results
        return only

    @property
    def inputs(self) -> list[Value]:
        """The operands that are present."""
        return [v for v in self.operands if v is not None]

    def __repr__(self) -> str:
        return f"{', '.join(map(repr, self.results))} = {self.name}({', '.join(map(repr, self.operands))})"


@dataclass(eq=False)
class Graph:
    """A function over tensors, of a name: inputs, ops in execution order, outputs, and states, the caches it uses."""

    name: str
    inputs: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    states: dict[str, StateType] = field(default_factory=dict)

    def users(self) -> dict[Value, list[Op]]:
        """For every value, the ops that read it, in order. Outputs of the graph are not counted."""
        table: dict[Value, list[Op]] = {v: [] for v in self.inputs}
        for op in self.ops:
            for value in dict.fromkeys(op.inputs):
                table.setdefault(value, []).append(op)
            for value in op.results:
                table.setdefault(value, [])
        return table

    def input(self, name: str) -> Value:
        """The graph input of that name."""
        for value in self.inputs:
            if value.name == name:
                return value
        raise KeyError(f"graph {self.name} has no input {name!r}; it has {[v.name for v in self.inputs]}")

    def batch(self) -> Value | None:
        """The batch input, when states are bound."""
        return next((v for v in self.inputs if isinstance(v.type, BatchType)), None)

    def replace_uses(self, old: Value, new: Value) -> None:
        """Every reader of `old`, and the graph outputs, read `new` instead."""
        for op in self.ops:
            if old in op.operands:
                op.operands = [new if v is old else v for v in op.operands]
        self.outputs = [new if v is old else v for v in self.outputs]

    def clone(self) -> Graph:
        """A deep copy: passes change their own copy, never the caller's."""
        fresh: dict[Value, Value] = {v: Value(v.name, v.type) for v in self.inputs}
        copy = Graph(self.name, list(fresh.values()), [], [], dict(self.states))
        for op in self.ops:
            twin = Op(op.name, [fresh[v] if v is not None else None for v in op.operands], [], dict(op.attrs), op.loc)
            for value in op.results:
                fresh[value] = Value(value.name, value.type, twin)
                twin.results.append(fresh[value])
            copy.ops.append(twin)
        copy.outputs = [fresh[v] for v in self.outputs]
        return copy


def count(ops: Iterable[Op]) -> dict[str, int]:
    """How many ops of each name."""
    table: dict[str, int] = {}
    for op in ops:
        table[op.name] = table.get(op.name, 0) + 1
    return table
