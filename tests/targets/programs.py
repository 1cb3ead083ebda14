"""Programs of a few ops over named values, and the ragged batches they run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcn_compile.ir import ops as _ops  # noqa: F401  (fills the op table)
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Location, Op, Value
from qcn_compile.ir.optable import TABLE
from qcn_compile.ir.types import BatchType, Dim, StateRef, StateType, TensorType, parse_type
from qcn_compile.targets.base import Bucket, Call, Operand
from qcn_compile.targets.cpu import CpuTarget

DECODE = Bucket("decode-8", 8, 8, 8)
PREFILL = Bucket("prefill-64", 64, 16, 64)
PROGRAMS: list[Program] = []
PLAIN = Encoding()


@dataclass(eq=False)
class Program:
    """Ops over named values. Inputs may be strided; ints are drawn from a range; weights carry an encoding."""

    name: str
    bucket: Bucket = PREFILL
    values: dict[Value, Any] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    states: dict[str, StateType] = field(default_factory=dict)
    references: dict[Op, Callable[..., Any]] = field(default_factory=dict)
    batch: Value = field(default_factory=lambda: Value("batch", BatchType()))
    registered: bool = True  # compiled with all others once a session; not so where lowering must fail

    def __post_init__(self) -> None:
        if self.registered:
            PROGRAMS.append(self)

    def input(self, name: str, type_: str, stride: int = 0, ints: tuple[int, Dim | str] | None = None,
              scale: float = 1.0) -> Value:
        """A runtime operand; ints=(low, high) draws whole numbers below high (a number or a symbol's name)."""
        value = Value(name, parse_type(type_))
        self.values[value] = ("input", stride, ints, scale)
        return value

    def weight(self, name: str, shape: tuple[int, ...], encoding: Encoding = PLAIN, scale: float = 0.2) -> Value:
        """A weight of the checkpoint."""
        value = Value(name, parse_type(f"f32[{','.join(map(str, shape))}]"))
        self.values[value] = ("weight", encoding, scale)
        return value

    def state(self, name: str, type_: StateType) -> StateRef:
        """A cache."""
        self.states[name] = type_
        return StateRef(name)

    def op(self, name: str, operands: Sequence[Value | None], reference: Callable[..., Any] | None = None,
           **attrs: Any) -> Any:
        """Append an op; returns its result, or a tuple of them."""
        types = [v.type if v is not None else None for v in operands]
        found = TABLE[name].infer(*types, **attrs)
        result_types = found if isinstance(found, tuple) else (found,)
        op = Op(name, list(operands), [], attrs, Location(f"test.{self.name}"))
        op.results = [Value(f"{name}.{i}", t, op) for i, t in enumerate(result_types)]
        self.ops.append(op)
        if reference is not None:
            self.references[op] = reference
        return op.results[0] if len(op.results) == 1 else tuple(op.results)

    def lower(self, target: CpuTarget) -> list[tuple[Op, Call]]:
        """All launches in order."""
        return [(op, c) for op in self.ops for c in target.lower(op, [self._operand(v) for v in op.operands],
                                                                 [v.tensor for v in op.results], self.bucket)]

    def _operand(self, value: Value | None) -> Operand | None:
        if value is None or isinstance(value.type, BatchType):
            return None
        kind = self.values.get(value, ("result", 0))
        if kind[0] == "weight":
            return Operand(value.tensor, 0, kind[1])
        return Operand(value.tensor, kind[1] or width_of(value.tensor))


def width_of(type_: TensorType) -> int:
    return int(np.prod([int(d) for d in type_.shape[1:]], dtype=np.int64))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Ragged:
    """Sequences of a batch: new tokens and tokens already cached, each."""

    lengths: tuple[int, ...]
    contexts: tuple[int, ...] = ()
    rows: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        return {"T": sum(self.lengths), "S": len(self.lengths), "R": self.rows}

    def context(self, s: int) -> int:
        return self.contexts[s] if self.contexts else 0
