"""Mixture of experts rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qcn_compile.ir.optable import op, same
from qcn_compile.ir.types import DType, TensorType, size_of


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) with gate and up stacked in one [2I, H] matrix."""
    gate, up = F.linear(x, gate_up.to(x.dtype)).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down.to(x.dtype))


def _expert_flops(types, results, attrs, sizes):  # type: ignore[no-untyped-def]
    x, ids, gate_up = types[0], types[1], types[3]
    return 3 * size_of(ids.shape, sizes) * gate_up.shape[1] * x.shape[1]


def _touched_experts(types, sizes):  # type: ignore[no-untyped-def]
    """Under uniform routing: 1 - (1 - 1/E)^pairs of the experts are read."""
    experts, pairs = int(types[3].shape[0]), size_of(types[1].shape, sizes)
    share = 1 - (1 - 1 / experts) ** pairs
    return {3: share, 4: share}


@op("moe_experts", "x, ids, weights, gate_up, down", activation=str, infer=same(), flops=_expert_flops,
    touched=_touched_experts)
def moe_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, activation: str) -> Tensor:
    """y[t] = sum_j weights[t,j] * down_e(silu(gate_e x) * up_e x), e = ids[t,j].

    x [T, H], ids i32 [T, k], weights f32 [T, k], gate_up [E, 2I, H], down [E, H, I] -> [T, H].
    (SwiGLU: Shazeer, "GLU Variants Improve Transformer", 2020)
    """
    if activation != "silu":
        raise NotImplementedError(f"expert activation {activation!r}; only silu (SwiGLU) is known")
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        y = swiglu(x[token], gate_up[expert], down[expert]).float()
        out.index_add_(0, token, y * weights[token, slot, None].float())
    return out.to(x.dtype)


@op("moe_add", "x, ids, weights, gate_up, down, r", activation=str, infer=same(), flops=_expert_flops,
    touched=_touched_experts)
def moe_add(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, r: Tensor, *,
            activation: str) -> Tensor:
    """y = r + moe_experts(x, ...): the experts with the residual add as their epilogue. r [T, H]."""
    return r + moe_experts(x, ids, weights, gate_up, down, activation=activation)


def _route(logits: TensorType, *, top_k: int, normalize: bool, shared: bool) -> tuple[TensorType, TensorType]:
    shape = (logits.shape[0], top_k + int(shared))
    return TensorType(DType.i32, shape), TensorType(DType.f32, shape)


@op("moe_route", "logits", top_k=int, normalize=bool, shared=bool, infer=_route)
def moe_route(logits: Tensor, *, top_k: int, normalize: bool, shared: bool) -> tuple[Tensor, Tensor]:
    """Router: p = softmax(logits), the top_k experts by p (ties: lower id first), weights p (normalised to sum 1).

    logits [T, E] -> ids i32 [T, k], weights f32 [T, k]. With `shared`, the last logit column is the shared expert's
    gate: it stays out of the softmax, and expert E-1 is appended to every token with weight sigmoid(gate).
    (Shazeer et al., "Outrageously Large Neural Networks", 2017)
    """
    scores = logits.float()
    routed = scores[:, :-1] if shared else scores
    p = torch.softmax(routed, -1)
    order = torch.sort(p, dim=-1, descending=True, stable=True)
    ids, weights = order.indices[:, :top_k], order.values[:, :top_k]
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if shared:
        ids = torch.cat([ids, torch.full_like(ids[:, :1], routed.shape[1])], -1)
        weights = torch.cat([weights, torch.sigmoid(scores[:, -1:])], -1)
    return ids.int(), weights
