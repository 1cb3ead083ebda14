"""Attention rows: rotary embedding, cache append, causal attention over the cached context."""

from __future__ import annotations

import torch
from torch import Tensor

from qcn_compile.ir.batch import TORCH, Batch
from qcn_compile.ir.ops.norm import rms
from qcn_compile.ir.optable import op, same
from qcn_compile.ir.types import DType, TensorType, size_of


def _table(positions: TensorType, inv_freq: TensorType, **_: object) -> tuple[TensorType, TensorType]:
    one = TensorType(DType.f32, (positions.shape[0], inv_freq.shape[0]))
    return one, one


@op("rope_table", "positions, inv_freq", scaling=float, infer=_table)
def rope_table(positions: Tensor, inv_freq: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """cos, sin of positions x inv_freq, times `scaling` (YaRN). positions i32 [T], inv_freq [R/2] -> f32 [T, R/2]."""
    angle = positions.float()[:, None] * inv_freq.float()
    return angle.cos() * scaling, angle.sin() * scaling


@op("rope", "x, cos, sin", infer=same())
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first 2*cos.shape[1] of each head's dims, halves paired (GPT-NeoX order), rest unchanged.

    x [T, heads, D], cos, sin f32 [T, R/2].
    """
    half = cos.shape[-1]
    c, s = cos[:, None].float(), sin[:, None].float()
    first, second, rest = x[..., :half].float(), x[..., half:2 * half].float(), x[..., 2 * half:]
    turned = torch.cat([first * c - second * s, second * c + first * s], -1).to(x.dtype)
    return torch.cat([turned, rest], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, context: int, scale: float, causal: bool = True) -> Tensor:
    """softmax(scale q k^T) v of one sequence; query i sees keys 0..context+i. q [n,Hq,D], k, v [m,Hkv,D] -> q-like."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.to(q.dtype).repeat_interleave(repeat, 1), v.to(q.dtype).repeat_interleave(repeat, 1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    if causal:
        limit = context + torch.arange(q.shape[0])[:, None]
        scores = scores.masked_fill(torch.arange(k.shape[0])[None] > limit, float("-inf"))
    p = torch.softmax(scores.float(), -1).to(q.dtype)
    return torch.einsum("hnm,mhd->nhd", p, v)


def _flops(types, results, attrs, sizes):  # type: ignore[no-untyped-def]
    context = sizes.get("context", sizes.get("T", 1))
    return 4 * size_of(results[0].shape, sizes) * context


@op("attention", "q, k, v, batch", scale=float, causal=bool, state=None, effects={"state": "rw"}, flops=_flops,
    infer=lambda q, k, v, *_, **__: TensorType(q.dtype, (*q.shape[:2], v.shape[2])))
def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, *, scale: float, causal: bool,
              state: str | None = None) -> Tensor:
    """Append k, v to the cache, attend causally within each sequence. q [T, Hq, D], k, v [T, Hkv, D] -> [T, Hq, D]."""
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype)
    for span in batch.spans():
        rows = slice(span.start, span.stop)
        keys, values = batch.append_kv(state, span, k[rows], v[rows]) if state else (k[rows], v[rows])
        out[rows] = attend(q[rows], keys, values, span.context, scale, causal)
    return out


@op("rope_append", "q, k, v, q_w?, k_w?, cos, sin, batch", eps=float, state=None, stored=None,
    effects={"state": "w"}, infer=same())
def rope_append(q: Tensor, k: Tensor, v: Tensor, q_w: Tensor | None, k_w: Tensor | None, cos: Tensor, sin: Tensor,
                batch: Batch, *, eps: float, state: str | None = None, stored: str | None = None) -> Tensor:
    """Per-head RMS norm of q and k (when a weight is given), rotary embedding of both, k and v appended to the cache,
    in the type `stored` if that is given, else as they are.

    q [T, Hq, D], k, v [T, Hkv, D], q_w, k_w [D], cos, sin f32 [T, R/2] -> the query, [T, Hq, D].
    """
    if q_w is not None:
        q = rms(q, q_w, eps).to(q.dtype)
    if k_w is not None:
        k = rms(k, k_w, eps).to(k.dtype)
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    for span in batch.spans():
        rows = slice(span.start, span.stop)
        batch.append_kv(state or "", span, _kept(k[rows], stored), _kept(v[rows], stored))
    return q


def _kept(x: Tensor, stored: str | None) -> Tensor:
    return x if stored is None else x.to(TORCH[stored])


def _paged(q: TensorType, *_: object, **__: object) -> TensorType:
    heads, dim = q.shape[1:]
    return TensorType(q.dtype, (q.shape[0], int(heads) * int(dim)))  # type: ignore[arg-type]


@op("paged_attention", "q, gate?, batch", scale=float, state=None, stored=None, effects={"state": "r"},
    flops=_flops, infer=_paged)
def paged_attention(q: Tensor, gate: Tensor | None, batch: Batch, *, scale: float, state: str | None = None,
                    stored: str | None = None) -> Tensor:
    """Causal attention over the cached keys and values, then the output gate: o * sigmoid(gate).

    q [T, Hq, D], gate [T, Hq*D] -> [T, Hq*D]. This step's keys are in the cache already (`rope_append`).
    """
    out = torch.empty_like(q)
    for span in batch.spans():
        rows = slice(span.start, span.stop)
        keys, values = batch.stored_kv(state or "", span)
        out[rows] = attend(q[rows], keys, values, span.context, scale)
    flat = out.reshape(q.shape[0], -1)
    return flat if gate is None else (flat.float() * torch.sigmoid(gate.float())).to(q.dtype)
