"""Ops that only GPU plans have: with one token, norms and rotations inside what reads them; the choice of tokens.

Each is written as the ops of the table that it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcn_compile.ir.batch import Batch
from qcn_compile.ir.ops.attention import paged_attention, rope_append
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


@op("rope_attention", "q, k, v, q_w?, k_w?, cos, sin, gate?, batch", eps=float, scale=float, state=None,
    stored=None, effects={"state": "rw"},
    infer=lambda q, *_, **__: TensorType(q.dtype, (q.shape[0], int(q.shape[1]) * int(q.shape[2]))),
    flops=lambda types, results, attrs, sizes: 4 * size_of(types[0].shape, sizes) * sizes.get("context", 1))
def rope_attention(q: Tensor, k: Tensor, v: Tensor, q_w: Tensor | None, k_w: Tensor | None, cos: Tensor, sin: Tensor,
                   gate: Tensor | None, batch: Batch, *, eps: float, scale: float, state: str | None = None,
                   stored: str | None = None) -> Tensor:
    """paged_attention(rope_append(...), gate): shapes as in those rows."""
    query = rope_append(q, k, v, q_w, k_w, cos, sin, batch, eps=eps, state=state, stored=stored)
    return paged_attention(query, gate, batch, scale=scale, state=state, stored=stored)


@op("sample", "logits", infer=lambda logits: TensorType(DType.i32, (logits.shape[0],)))
def sample(logits: Tensor) -> Tensor:
    """The next token of each wanted row: the likeliest. What else a request asks for (temperature, penalties) is in the
    input arrays, as runtime/cuda/sampling.py writes them. logits [R, V] -> [R]."""
    return logits.argmax(-1).to(torch.int32)
