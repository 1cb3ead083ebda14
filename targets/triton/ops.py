"""Ops that only GPU plans of one token have: norms and the router as prologues of what reads them.

Each is written as the ops of the table that it stands for.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qcn_compile.ir.batch import Batch
from qcn_compile.ir.ops.attention import paged_attention, rope_append
from qcn_compile.ir.ops.deltanet import delta_net
from qcn_compile.ir.ops.linear import linear
from qcn_compile.ir.ops.moe import moe_experts, moe_route
from qcn_compile.ir.ops.norm import rms_norm
from qcn_compile.ir.optable import op, row, same
from qcn_compile.ir.types import TensorType, size_of


def _product(x: TensorType, w: TensorType) -> TensorType:
    return TensorType(x.dtype, (x.shape[0], w.shape[0]))


def _flops(types: list[Any], results: list[Any], attrs: dict[str, Any], sizes: dict[str, int]) -> int:
    return 2 * sum(size_of(r.shape, sizes) for r in results) * int(types[0].shape[-1])


@op("norm_linear", "x, norm_w, w", eps=float, flops=_flops, infer=lambda x, norm_w, w, **_: _product(x, w))
def norm_linear(x: Tensor, norm_w: Tensor, w: Tensor, *, eps: float) -> Tensor:
    """y = rms_norm(x, norm_w) w^T. x [T, K], w [N, K] -> [T, N]."""
    return linear(rms_norm(x, norm_w, eps=eps), w)


@op("norm_linear_pair", "x, norm_w, w, w2", eps=float, flops=_flops,
    infer=lambda x, norm_w, w, w2, *, eps: (_product(x, w), _product(x, w2)))
def norm_linear_pair(x: Tensor, norm_w: Tensor, w: Tensor, w2: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Two products of one normed x: weights stored in two formats. x [T, K], w [N, K], w2 [N2, K]."""
    normed = rms_norm(x, norm_w, eps=eps)
    return linear(normed, w), linear(normed, w2)


@op("norm_route_experts", "x, norm_w, logits, gate_up, down, r?", eps=float, top_k=int, normalize=bool, shared=bool,
    activation=str, infer=same(),
    flops=lambda types, results, attrs, sizes: 6 * (attrs["top_k"] + attrs["shared"])
    * size_of(types[0].shape, sizes) * int(types[4].shape[2]),
    touched=lambda types, sizes, attrs: dict.fromkeys((3, 4), (attrs["top_k"] + attrs["shared"]) / types[3].shape[0]))
def norm_route_experts(x: Tensor, norm_w: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, r: Tensor | None, *,
                       eps: float, top_k: int, normalize: bool, shared: bool, activation: str) -> Tensor:
    """y = (r +) moe_experts(rms_norm(x, norm_w), *moe_route(logits), gate_up, down). Shapes as in those rows."""
    ids, weights = moe_route(logits, top_k=top_k, normalize=normalize, shared=shared)
    y = moe_experts(rms_norm(x, norm_w, eps=eps), ids, weights, gate_up, down, activation=activation)
    return y if r is None else r + y


def _projected(qkv: TensorType, *operands: Any, **_: object) -> TensorType:
    return TensorType(qkv.dtype, (qkv.shape[0], operands[8].shape[0]))


@op("delta_net_linear", "qkv, z, b, a, conv_w, decay, dt_bias, norm_w, batch, w, r?",
    key_heads=int, value_heads=int, key_dim=int, value_dim=int, eps=float, conv=None, delta=None,
    effects={"conv": "rw", "delta": "rw"}, infer=_projected,
    flops=lambda types, results, attrs, sizes: row("delta_net").flops(types, results, attrs, sizes)  # type: ignore[misc]
    + 2 * size_of(results[0].shape, sizes) * int(types[9].shape[1]))
def delta_net_linear(qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_w: Tensor, decay: Tensor, dt_bias: Tensor,
                     norm_w: Tensor, batch: Batch, w: Tensor, r: Tensor | None, **attrs: Any) -> Tensor:
    """y = (r +) delta_net(...) w^T: the heads' norm is finished by the projection. w [N, value_heads*value_dim]."""
    y = linear(delta_net(qkv, z, b, a, conv_w, decay, dt_bias, norm_w, batch, **attrs), w)
    return y if r is None else r + y


@op("rope_attention", "q, k, v, q_w?, k_w?, cos, sin, gate?, batch", eps=float, scale=float, state=None,
    effects={"state": "rw"},
    infer=lambda q, *_, **__: TensorType(q.dtype, (q.shape[0], int(q.shape[1]) * int(q.shape[2]))),
    flops=lambda types, results, attrs, sizes: 4 * size_of(types[0].shape, sizes) * sizes.get("context", 1))
def rope_attention(q: Tensor, k: Tensor, v: Tensor, q_w: Tensor | None, k_w: Tensor | None, cos: Tensor, sin: Tensor,
                   gate: Tensor | None, batch: Batch, *, eps: float, scale: float, state: str | None = None) -> Tensor:
    """paged_attention(rope_append(...), gate): shapes as in those rows."""
    query = rope_append(q, k, v, q_w, k_w, cos, sin, batch, eps=eps, state=state)
    return paged_attention(query, gate, batch, scale=scale, state=state)
