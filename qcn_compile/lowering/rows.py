"""Static values by rows: as much of a weight as is asked for is read, moved and computed, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from qcn_compile.ir.batch import TORCH
from qcn_compile.ir.encoding import wide
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.interpret import Weights, run_op
from qcn_compile.ir.pieces import Piece, cat, narrow, reshape

POINTWISE = ("cast", "neg", "exp", "add_scalar", "mul_scalar")


class Source(Protocol):
    """Where weights come from."""

    def get(self, name: str) -> Tensor:
        """A whole weight, in the dtype of its `weight` op."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Piece:
        """Some rows (experts of a stack), as stored when that is exact, else in the dtype of the `weight` op."""
        ...


@dataclass(frozen=True)
class Tensors:
    """Weights that are in memory, by name; `get` gives them in f32."""

    table: Mapping[str, Tensor]

    def get(self, name: str) -> Tensor:
        return self.table[name].float()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.table[name][start:stop]


@torch.no_grad()
def evaluate(value: Value, weights: Weights) -> Tensor:
    """The tensor of a static value. Nothing is kept: what two values share is computed twice, memory stays low."""
    if value.op is None:
        raise ValueError(f"%{value.name} is an input, not a static value")
    results = run_op(value.op, [evaluate(v, weights) for v in value.op.inputs], weights)
    tensor: Tensor = results[value.op.results.index(value)]
    return tensor


class Rows:
    """Rows of a static value on demand. What cannot be computed by rows is computed whole, once, and kept.

    `known`: values that need not be computed, such as calibrated ones.
    """

    def __init__(self, value: Value, source: Source, known: Mapping[Value, Piece] | None = None) -> None:
        self.value, self._source = value, source
        self._whole: dict[Value, Piece] = dict(known or {})
        self._prepare(value)

    def _prepare(self, value: Value) -> None:
        if value in self._whole:
            return
        if value.op is not None and _by_rows(value.op):
            for operand in value.op.inputs:
                self._prepare(operand)
        else:
            self._whole[value] = evaluate(value, self._source.get)

    @torch.no_grad()
    def get(self, start: int, stop: int) -> Piece:
        """Rows start..stop of the first axis."""
        return self._rows(self.value, start, stop)

    def _rows(self, value: Value, start: int, stop: int) -> Piece:
        if value in self._whole:
            return narrow(self._whole[value], 0, start, stop)
        assert value.op is not None
        op, x = value.op, value.op.inputs[0] if value.op.inputs else value
        if op.name == "weight":
            return self._source.rows(str(op.attrs["name"]), start, stop)
        if op.name == "concat":
            return self._concat(op, start, stop)
        if op.name == "take_rows":
            return cat([self._rows(x, *run) for run in _runs(op, start, stop)], 0)
        if op.name == "slice":
            axis, first, last = (int(op.attrs[a]) for a in ("axis", "start", "stop"))  # type: ignore[arg-type]
            if axis == 0:
                return self._rows(x, first + start, first + stop)
            return narrow(self._rows(x, start, stop), axis, first, last)
        if op.name == "reshape":
            factor = _elements(value) // _elements(x)
            return reshape(self._rows(x, start * factor, stop * factor), (stop - start, *_row(value)))
        operand = wide(self._rows(x, start, stop)).to(TORCH[x.tensor.dtype.value])
        result: Tensor = run_op(op, [operand])[0]
        return result

    def _concat(self, op: Op, start: int, stop: int) -> Piece:
        axis = int(op.attrs["axis"])  # type: ignore[arg-type]
        if axis:
            return cat([self._rows(v, start, stop) for v in op.inputs], axis)
        parts, at = [], 0
        for v in op.inputs:
            size = int(v.tensor.shape[0])  # type: ignore[arg-type]
            first, last = max(start - at, 0), min(stop - at, size)
            if first < last:
                parts.append(self._rows(v, first, last))
            at += size
        return cat(parts, 0)


def _by_rows(op: Op) -> bool:
    """Whether rows of the result need some rows of the operands only."""
    if op.name == "reshape":
        return _elements(op.result) % _elements(op.inputs[0]) == 0
    return op.name in ("weight", "concat", "take_rows", "slice", *POINTWISE)


def _row(value: Value) -> tuple[int, ...]:
    return tuple(int(d) for d in value.tensor.shape[1:])  # type: ignore[arg-type]


def _elements(value: Value) -> int:
    return prod(_row(value))


def _runs(op: Op, start: int, stop: int) -> list[tuple[int, int]]:
    """Where rows start..stop of a take_rows come from, as (first, last) of its operand."""
    found, at = [], 0
    runs: tuple[tuple[int, int], ...] = op.attrs["runs"]  # type: ignore[assignment]
    for first, count in runs:
        low, high = max(start - at, 0), min(stop - at, count)
        if low < high:
            found.append((first + low, first + high))
        at += count
    return found
