"""Pointwise rows, reductions and casts: what a traced graph is made of before fusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcn_compile.errors import IRError
from qcn_compile.ir.batch import TORCH
from qcn_compile.ir.optable import op, same
from qcn_compile.ir.types import Dim, DType, TensorType


def broadcast(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """NumPy broadcasting over symbolic shapes."""
    rank = max(map(len, shapes))
    result: list[Dim] = []
    for axis in range(rank):
        sizes = {s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0} - {1}
        if len(sizes) > 1:
            raise IRError(f"shapes {' and '.join(map(str, shapes))} do not broadcast")
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)


_RANK = [DType.i1, DType.u8, DType.i8, DType.i32, DType.i64, DType.f8e4m3, DType.bf16, DType.f16, DType.f32]


def _binary(a: TensorType, b: TensorType, **_: Any) -> TensorType:
    return TensorType(max(a.dtype, b.dtype, key=_RANK.index), broadcast(a.shape, b.shape))


def _register_binary(name: str, fn: Callable[[Tensor, Tensor], Tensor], commutative: bool) -> None:
    def reference(a: Tensor, b: Tensor) -> Tensor:
        return fn(a, b)

    reference.__doc__ = f"Pointwise {name} with broadcasting."
    op(name, "a, b", infer=_binary, commutative=commutative)(reference)


def _register_unary(name: str, fn: Callable[[Tensor], Tensor]) -> None:
    def reference(x: Tensor) -> Tensor:
        return fn(x)

    reference.__doc__ = f"Pointwise {name}."
    op(name, "x", infer=same())(reference)


for _name, _fn, _commutes in [("add", torch.add, True), ("mul", torch.mul, True), ("sub", torch.sub, False),
                              ("div", torch.div, False)]:
    _register_binary(_name, _fn, _commutes)
for _name, _unary in [("neg", torch.neg), ("exp", torch.exp), ("rsqrt", torch.rsqrt), ("sigmoid", torch.sigmoid),
                      ("silu", F.silu), ("softplus", F.softplus), ("cos", torch.cos), ("sin", torch.sin)]:
    _register_unary(_name, _unary)


@op("add_scalar", "x", value=float, infer=same())
def add_scalar(x: Tensor, *, value: float) -> Tensor:
    """x + value."""
    return x + value


@op("mul_scalar", "x", value=float, infer=same())
def mul_scalar(x: Tensor, *, value: float) -> Tensor:
    """x * value."""
    return x * value


@op("pow", "x", exponent=float, infer=same())
def power(x: Tensor, *, exponent: float) -> Tensor:
    """x ** exponent."""
    return x.pow(exponent)


@op("cast", "x", dtype=DType, infer=lambda x, *, dtype: TensorType(dtype, x.shape))
def cast(x: Tensor, *, dtype: DType) -> Tensor:
    """The same values in another dtype."""
    return x.to(TORCH[dtype.value])


def _reduced(x: TensorType, *, axis: int, keepdim: bool) -> TensorType:
    at = axis % x.rank
    return TensorType(x.dtype, x.shape[:at] + ((1,) if keepdim else ()) + x.shape[at + 1:])


@op("mean", "x", axis=int, keepdim=bool, infer=_reduced)
def mean(x: Tensor, *, axis: int, keepdim: bool) -> Tensor:
    """Arithmetic mean over one axis."""
    return x.mean(axis, keepdim=keepdim)


@op("sum", "x", axis=int, keepdim=bool, infer=_reduced)
def total(x: Tensor, *, axis: int, keepdim: bool) -> Tensor:
    """Sum over one axis."""
    return x.sum(axis, keepdim=keepdim)


@op("softmax", "x", axis=int, dtype=DType, infer=lambda x, *, axis, dtype: TensorType(dtype, x.shape))
def softmax(x: Tensor, *, axis: int, dtype: DType) -> Tensor:
    """Softmax over one axis, computed and returned in `dtype`."""
    return torch.softmax(x, axis, dtype=TORCH[dtype.value])


def _topk(x: TensorType, *, k: int) -> tuple[TensorType, TensorType]:
    return TensorType(x.dtype, (*x.shape[:-1], k)), TensorType(DType.i64, (*x.shape[:-1], k))


@op("topk", "x", k=int, infer=_topk)
def topk(x: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last axis, descending, ties to the lower index: (values, indices)."""
    order = torch.sort(x, dim=-1, descending=True, stable=True)
    return order.values[..., :k], order.indices[..., :k]


@op("silu_mul", "gate, up", infer=same())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up: the SwiGLU product. Both [T, I]."""
    return F.silu(gate) * up


@op("mul_sigmoid", "x, gate", infer=same())
def mul_sigmoid(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate), gate broadcast over the last axis when its width is 1."""
    return x * torch.sigmoid(gate)
