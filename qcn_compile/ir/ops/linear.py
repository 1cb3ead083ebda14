"""Matrix products and table look-ups. Weights are [out, in] as in the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qcn_compile.ir import encoding
from qcn_compile.ir.optable import op, same
from qcn_compile.ir.types import TensorType, size_of


def _flops(types, results, attrs, sizes):  # type: ignore[no-untyped-def]
    return 2 * size_of(results[0].shape, sizes) * types[0].shape[-1]


def _infer(x: TensorType, w: TensorType, *_: TensorType, **__: object) -> TensorType:
    return TensorType(x.dtype, (*x.shape[:-1], w.shape[0]))


@op("linear", "x, w, bias?", infer=_infer, flops=_flops)
def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x w^T (+ bias). x [..., K], w [N, K], bias [N] -> [..., N]."""
    return F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))


@op("linear_add", "x, w, r", infer=_infer, flops=_flops)
def linear_add(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    """y = r + x w^T: a projection with the residual add as its epilogue. x [T, K], w [N, K], r [T, N]."""
    return r + F.linear(x, w.to(x.dtype))


def _rows(index: int, rows: int):  # type: ignore[no-untyped-def]
    """Operand `index` is a table of which as many rows are read as operand `rows` has elements."""
    return lambda types, sizes: {
        index: min(1.0, size_of(types[rows].shape, sizes) / size_of(types[index].shape[:1], sizes))}


@op("embedding", "ids, w", touched=_rows(1, 0), first=0,
    infer=lambda ids, w, **_: TensorType(w.dtype, (*ids.shape, w.shape[1])))
def embedding(ids: Tensor, w: Tensor, *, first: int = 0) -> Tensor:
    """y[t] = w[ids[t] - first], zeros for an id whose row is not in the table. ids i32 [T], w [V, H] -> [T, H]."""
    rows = ids.long() - first
    there = (rows >= 0) & (rows < w.shape[0])
    return torch.where(there[..., None], w[rows.clamp(0, w.shape[0] - 1)], 0)


@op("gather_rows", "x, rows", touched=_rows(0, 1),
    infer=lambda x, rows, **_: TensorType(x.dtype, (rows.shape[0], *x.shape[1:])))
def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """y[i] = x[rows[i]]: the tokens whose logits are wanted. x [T, H], rows i32 [R] -> [R, H]."""
    return x[rows.long()]


@op("encode", "w", format=str, group=int, activations=str, infer=same())
def encode(w: Tensor, *, format: str, group: int, activations: str) -> Tensor:
    """The weight [..., N, K] as it is stored: the values that remain after quantisation (f32, bf16, int8, int4, fp8;
    see `encoding`), in the dtype of w.

    `activations` tells what kernels multiply it with (f32 or int8); it does not change the weight.
    """
    values = encoding.encode(w.float().numpy(), encoding.Encoding(format, group, activations))
    return torch.from_numpy(values).to(w.dtype)
