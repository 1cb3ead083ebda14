"""Rows that move or name data: views, slices, concatenation, weights and constants."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from qcn_compile.errors import IRError
from qcn_compile.ir.batch import TORCH
from qcn_compile.ir.optable import op
from qcn_compile.ir.types import Dim, DType, Sym, TensorType, product_dim


def _free(*_: Any) -> int:
    return 0


@op("weight", "", name=str, dtype=DType, shape=tuple, flops=_free,
    infer=lambda *, name, dtype, shape: TensorType(dtype, shape))
def weight(*, name: str, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the checkpoint, by its name in the traced model. The interpreter asks its weight source for it."""
    raise IRError(f"weight {name!r} was read without a weight source")


@op("constant", "", dtype=DType, shape=tuple, values=tuple, flops=_free,
    infer=lambda *, dtype, shape, values: TensorType(dtype, shape))
def constant(*, dtype: DType, shape: tuple[int, ...], values: tuple[float, ...]) -> Tensor:
    """Literal values, row-major."""
    return torch.tensor(values, dtype=TORCH[dtype.value]).reshape(shape)


def resolve_shape(source: tuple[Dim, ...], wanted: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """`wanted` with its one -1 replaced by what the element count of `source` leaves."""
    if -1 not in wanted:
        return wanted
    total, rest = product_dim(source), [d for d in wanted if d != -1]
    known = product_dim(tuple(rest))
    if isinstance(total, Sym) and isinstance(known, Sym):
        missing: Dim = total.scale // known.scale
    elif isinstance(total, Sym):
        missing = Sym(total.name, total.scale // int(known), total.offset // int(known))  # type: ignore[arg-type]
    else:
        missing = int(total) // int(known)  # type: ignore[arg-type]
    return tuple(missing if d == -1 else d for d in wanted)


@op("reshape", "x", shape=tuple, flops=_free,
    infer=lambda x, *, shape: TensorType(x.dtype, resolve_shape(x.shape, shape)))
def reshape(x: Tensor, *, shape: tuple[Dim, ...]) -> Tensor:
    """The same elements in row-major order under another shape; at most one symbolic size, any one size may be -1."""
    symbolic = sum(isinstance(d, Sym) for d in shape)
    if symbolic > 1:
        raise IRError(f"reshape to {shape}: more than one symbolic size")
    known = prod(d for d in shape if isinstance(d, int) and d != -1)
    if symbolic and -1 not in shape:
        return x.reshape([x.numel() // known if isinstance(d, Sym) else d for d in shape])
    if symbolic:
        head = next(d for d in shape if isinstance(d, Sym))
        return x.reshape([x.shape[0] * head.scale if isinstance(d, Sym) else d for d in shape])
    return x.reshape(list(shape))


def _transposed(x: TensorType, *, a: int, b: int) -> TensorType:
    dims = list(x.shape)
    dims[a], dims[b] = dims[b], dims[a]
    return TensorType(x.dtype, tuple(dims))


@op("transpose", "x", a=int, b=int, infer=_transposed, flops=_free)
def transpose(x: Tensor, *, a: int, b: int) -> Tensor:
    """Axes a and b exchanged (both counted from the front)."""
    return x.transpose(a, b)


def _sliced(x: TensorType, *, axis: int, start: int, stop: int) -> TensorType:
    return TensorType(x.dtype, x.shape[:axis] + (stop - start,) + x.shape[axis + 1:])


@op("slice", "x", axis=int, start=int, stop=int, infer=_sliced, flops=_free)
def slice_(x: Tensor, *, axis: int, start: int, stop: int) -> Tensor:
    """x[..., start:stop, ...] along a static axis, 0 <= start < stop <= size."""
    return x.narrow(axis, start, stop - start)


def _concat(*xs: TensorType, axis: int) -> TensorType:
    size = sum(int(x.shape[axis]) for x in xs)  # type: ignore[arg-type, misc]
    first = xs[0]
    return TensorType(first.dtype, first.shape[:axis] + (size,) + first.shape[axis + 1:])


@op("concat", "*xs", axis=int, infer=_concat, flops=_free)
def concat(*xs: Tensor, axis: int) -> Tensor:
    """The operands one after another along a static axis."""
    return torch.cat(xs, axis)


@op("expand", "x", shape=tuple, flops=_free, infer=lambda x, *, shape: TensorType(x.dtype, shape))
def expand(x: Tensor, *, shape: tuple[Dim, ...]) -> Tensor:
    """Axes of size 1 repeated to `shape` (static sizes only)."""
    return x.expand([int(d) for d in shape])  # type: ignore[arg-type]


def _taken(x: TensorType, *, runs: tuple[tuple[int, int], ...]) -> TensorType:
    return TensorType(x.dtype, (sum(n for _, n in runs), *x.shape[1:]))


@op("take_rows", "x", runs=tuple, flops=_free, infer=_taken)
def take_rows(x: Tensor, *, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """Rows of a weight in the order a kernel wants them: for each (start, count) of `runs`, x[start:start+count]."""
    return torch.cat([x[start:start + count] for start, count in runs])
