"""Gated DeltaNet rows (Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qcn_compile.ir.batch import TORCH, Batch
from qcn_compile.ir.ops.norm import rms
from qcn_compile.ir.optable import op, same
from qcn_compile.ir.types import TensorType, size_of

L2_EPS = 1e-6


@op("causal_conv1d", "x, w, bias?, batch", activation=None, state=None, effects={"state": "rw"}, infer=same())
def causal_conv1d(x: Tensor, w: Tensor, bias: Tensor | None, batch: Batch, *, activation: str | None = None,
                  state: str | None = None) -> Tensor:
    """Depthwise causal convolution over each sequence: y[t,c] = act(sum_i w[c,i] x[t-W+1+i, c] + bias[c]).

    x [T, C], w [C, W]. The state holds the last W-1 inputs, [C, W-1], oldest first; zeros at the first token.
    """
    width = w.shape[1]
    out = torch.empty_like(x)
    for span in batch.spans():
        past = batch.state(state or "", span, (x.shape[1], width - 1), x.dtype)
        full = torch.cat([past, x[span.start:span.stop].t()], 1)
        y = F.conv1d(full[None], w.to(x.dtype).unsqueeze(1), bias, groups=x.shape[1])[0].t()
        out[span.start:span.stop] = F.silu(y) if activation == "silu" else y
        if state:
            batch.keep(state, span, full[:, full.shape[1] - (width - 1):])
    return out


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor,
               rounds: str | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence for one sequence, in fp32; returns (output [n, Hv, Dv], final state).

    S <- exp(g_t) S;  S <- S + k_t (beta_t (v_t - S^T k_t))^T;  o_t = S^T q_t.   S [Hv, Dk, Dv].
    With `rounds`, S is rounded to that type before the next token.
    """
    out = torch.empty_like(v)
    for t in range(v.shape[0]):
        s = s * g[t].exp()[:, None, None]
        delta = (v[t] - torch.einsum("hkv,hk->hv", s, k[t])) * beta[t][:, None]
        s = s + k[t][:, :, None] * delta[:, None, :]
        out[t] = torch.einsum("hkv,hk->hv", s, q[t])
        if rounds is not None:
            s = s.to(TORCH[rounds]).float()
    return out, s


def _rule_flops(types, results, attrs, sizes):  # type: ignore[no-untyped-def]
    return 7 * size_of(types[2].shape, sizes) * types[1].shape[-1]


@op("gated_delta_rule", "q, k, v, g, beta, batch", qk_l2norm=bool, state=None, rounds=None,
    effects={"state": "rw"},
    infer=lambda q, k, v, *_, **__: TensorType(q.dtype, v.shape), flops=_rule_flops)
def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, batch: Batch, *, qk_l2norm: bool,
                     state: str | None = None, rounds: str | None = None) -> Tensor:
    """Gated delta rule over each sequence (see `delta_rule`), q scaled by 1/sqrt(Dk), q and k shared by Hv/Hk heads.

    q, k [T, Hk, Dk], v [T, Hv, Dv], g (log decay) and beta [T, Hv] -> [T, Hv, Dv]. State [Hv, Dk, Dv] in fp32, with
    `rounds` rounded to that type after every token.
    With `qk_l2norm`, q and k are divided by sqrt(sum(x^2) + 1e-6) first.
    """
    dtype, repeat = q.dtype, v.shape[1] // k.shape[1]
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    if qk_l2norm:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPS) for x in (q, k))
    q, k = (q * q.shape[-1] ** -0.5).repeat_interleave(repeat, 1), k.repeat_interleave(repeat, 1)
    out = torch.empty_like(v)
    for span in batch.spans():
        rows = slice(span.start, span.stop)
        s = batch.state(state or "", span, (v.shape[1], k.shape[2], v.shape[2]), torch.float32)
        out[rows], s = delta_rule(q[rows], k[rows], v[rows], g[rows], beta[rows], s, rounds)
        if state:
            batch.keep(state, span, s)
    return out.to(dtype)


@op("delta_gate", "a, decay, dt_bias", infer=lambda a, *_, **__: TensorType(_[0].dtype, a.shape))
def delta_gate(a: Tensor, decay: Tensor, dt_bias: Tensor) -> Tensor:
    """Log decay g = decay * softplus(a + dt_bias) with decay = -exp(A_log). a [T, Hv], decay, dt_bias f32 [Hv]."""
    return decay * F.softplus(a.float() + dt_bias.float())


def _net_flops(types, results, attrs, sizes):  # type: ignore[no-untyped-def]
    per_token = 7 * attrs["value_heads"] * attrs["key_dim"] * attrs["value_dim"] + 2 * types[4].shape[0] * 4
    return size_of(types[0].shape[:1], sizes) * per_token


@op("delta_net", "qkv, z, b, a, conv_w, decay, dt_bias, norm_w, batch",
    key_heads=int, value_heads=int, key_dim=int, value_dim=int, eps=float, conv=None, delta=None, rounds=None,
    effects={"conv": "rw", "delta": "rw"}, flops=_net_flops,
    infer=lambda qkv, *_, value_heads, value_dim, **__: TensorType(qkv.dtype, (qkv.shape[0], value_heads * value_dim)))
def delta_net(qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_w: Tensor, decay: Tensor, dt_bias: Tensor,
              norm_w: Tensor, batch: Batch, *, key_heads: int, value_heads: int, key_dim: int, value_dim: int,
              eps: float, conv: str | None = None, delta: str | None = None, rounds: str | None = None) -> Tensor:
    """The whole token mixer between the projections: conv + silu, gates, L2 norm, delta rule, gated norm.

    qkv [T, C] with C = 2*key_heads*key_dim + value_heads*value_dim laid out q|k|v, z [T, value_heads*value_dim],
    b, a [T, value_heads], conv_w [C, W], decay, dt_bias [value_heads], norm_w [value_dim]
    -> [T, value_heads*value_dim]. States: conv [C, W-1], delta [value_heads, key_dim, value_dim] fp32, or of the
    type that it `rounds` to after every token.
    """
    mixed = causal_conv1d(qkv, conv_w, None, batch, activation="silu", state=conv)
    width = key_heads * key_dim
    q, k, v = mixed.split([width, width, value_heads * value_dim], -1)
    tokens = qkv.shape[0]
    out = gated_delta_rule(
        q.reshape(tokens, key_heads, key_dim), k.reshape(tokens, key_heads, key_dim),
        v.reshape(tokens, value_heads, value_dim), delta_gate(a, decay, dt_bias), torch.sigmoid(b), batch,
        qk_l2norm=True, state=delta, rounds=rounds)
    gate = F.silu(z.reshape(tokens, value_heads, value_dim).float())
    return (rms(out, norm_w, eps) * gate).to(qkv.dtype).reshape(tokens, -1)
