"""Ops that only GPU plans have: an RMS norm as the prologue of the products that read it, and the choice of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcn_compile.ir.ops.linear import linear
from qcn_compile.ir.ops.norm import rms_norm
from qcn_compile.ir.optable import op
from qcn_compile.ir.types import DType, TensorType, size_of


def _product(x: TensorType, w: TensorType) -> TensorType:
    return TensorType(x.dtype, (x.shape[0], w.shape[0]))


def _flops(types: list[Any], results: list[Any], attrs: dict[str, Any], sizes: dict[str, int]) -> int:
    return 2 * sum(size_of(r.shape, sizes) for r in results) * int(types[0].shape[-1])


@op("norm_linear", "x, norm_w, w", eps=float, keep=bool, flops=_flops,
    infer=lambda x, norm_w, w, *, eps, keep: (_product(x, w), x) if keep else _product(x, w))
def norm_linear(x: Tensor, norm_w: Tensor, w: Tensor, *, eps: float, keep: bool) -> Any:
    """y = rms_norm(x, norm_w) w^T; with `keep` the normed x too. x [T, K], w [N, K] -> [T, N] (, [T, K])."""
    normed = rms_norm(x, norm_w, eps=eps)
    return (linear(normed, w), normed) if keep else linear(normed, w)


@op("norm_linear_pair", "x, norm_w, w, w2", eps=float, flops=_flops,
    infer=lambda x, norm_w, w, w2, *, eps: (_product(x, w), _product(x, w2)))
def norm_linear_pair(x: Tensor, norm_w: Tensor, w: Tensor, w2: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Two products of one normed x: weights stored in two formats. x [T, K], w [N, K], w2 [N2, K]."""
    normed = rms_norm(x, norm_w, eps=eps)
    return linear(normed, w), linear(normed, w2)


@op("sample", "logits", infer=lambda logits: TensorType(DType.i32, (logits.shape[0],)))
def sample(logits: Tensor) -> Tensor:
    """The next token of each wanted row: the likeliest. What else a request asks for (temperature, penalties) is in the
    input arrays, as runtime/cuda/sampling.py writes them. logits [R, V] -> [R]."""
    return logits.argmax(-1).to(torch.int32)
