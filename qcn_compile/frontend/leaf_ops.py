"""The leaf ops of a trace, `qcn::*`: what mixes tokens, and the expert bank. All else in a trace is local to a token.

They are functional and take the layouts that transformers hands to its extension points. `handle` is the path of the
module that owns the cache; `cu_seqlens` i32 [S+1] bounds the sequences of a ragged batch (None: one sequence).
The references below run when a model is executed with these ops; the graph's own references are in the op table.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.library import custom_op

from qcn_compile.ir.batch import Batch
from qcn_compile.ir.ops import attention as attention_rows
from qcn_compile.ir.ops import deltanet, moe


def _batch(tokens: int, cu_seqlens: Tensor | None) -> Batch:
    """The ragged batch that `cu_seqlens` describes, as the op table's references take it."""
    ends = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    return Batch.fresh([b - a for a, b in pairwise(ends)])


@custom_op("qcn::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, handle: str,
              cu_seqlens: Tensor | None = None) -> Tensor:
    """Softmax attention within each sequence. q [1, Hq, T, D], k, v [1, Hkv, T, D] -> [1, T, Hq, D]."""
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    return attention_rows.attention(*rows, _batch(q.shape[2], cu_seqlens), scale=scale, causal=causal)[None]


@custom_op("qcn::causal_conv1d", mutates_args=())
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, handle: str,
                  cu_seqlens: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution within each sequence. x [1, C, T], weight [C, W], bias [C] -> [1, C, T]."""
    batch = _batch(x.shape[2], cu_seqlens)
    out = deltanet.causal_conv1d(x[0].t(), weight, bias, batch, activation=activation)
    return out.t()[None].contiguous()


@custom_op("qcn::gated_delta_rule", mutates_args=())
def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, qk_l2norm: bool, handle: str,
                     cu_seqlens: Tensor | None = None) -> Tensor:
    """Gated delta rule within each sequence. q, k [1, T, Hk, Dk], v [1, T, Hv, Dv], g, beta [1, T, Hv] -> like v."""
    batch = _batch(q.shape[1], cu_seqlens)
    return deltanet.gated_delta_rule(q[0], k[0], v[0], g[0], beta[0], batch, qk_l2norm=qk_l2norm)[None]


@custom_op("qcn::moe_experts", mutates_args=())
def moe_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Weighted sum of the chosen SwiGLU experts. x [T, H], ids, weights [T, k], gate_up [E, 2I, H], down [E, H, I]."""
    return moe.moe_experts(x, ids, weights, gate_up, down, activation=activation)


@attention.register_fake
def _attention_shape(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, handle: str,
                     cu_seqlens: Tensor | None = None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@causal_conv1d.register_fake
def _conv_shape(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, handle: str,
                cu_seqlens: Tensor | None = None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@gated_delta_rule.register_fake
def _delta_shape(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, qk_l2norm: bool, handle: str,
                 cu_seqlens: Tensor | None = None) -> Tensor:
    return q.new_empty(v.shape)


@moe_experts.register_fake
def _moe_shape(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    return torch.empty_like(x)
