"""Gated delta rule for training: chunked, every chunk in parallel except one small matrix product per chunk.

With S the [key_dim, value_dim] state of a head, each token does
    S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  out = S^T q / sqrt(key_dim).
Inside a chunk the updates solve a unit lower triangular system; between chunks S_next = A S + B, with A and B small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BASE_BLOCK = 16


def _invert_base(lower: torch.Tensor) -> torch.Tensor:
    """(I + lower)^-1 for small blocks by doubling the size of the inverted diagonal blocks (stable, unlike powers)."""
    n = lower.shape[-1]
    row = torch.arange(n, device=lower.device)
    inverse = torch.eye(n, device=lower.device, dtype=lower.dtype)
    size = 1
    while size < n:
        block = row // size
        below = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
        step = lower * below
        inverse = inverse - (step if size == 1 else inverse @ step @ inverse)
        size *= 2
    return inverse


def _invert(lower: torch.Tensor) -> torch.Tensor:
    """(I + lower)^-1 by halves: [[A, 0], [C, B]]^-1 = [[A', 0], [-B' C A', B']]."""
    n = lower.shape[-1]
    if n <= BASE_BLOCK:
        return _invert_base(lower)
    half = n // 2
    diagonal = torch.stack([lower[..., :half, :half], lower[..., half:, half:]], 0)
    upper_inverse, lower_inverse = _invert(diagonal)
    corner = -(lower_inverse @ lower[..., half:, :half] @ upper_inverse)
    top = torch.cat([upper_inverse, torch.zeros_like(corner)], -1)
    return torch.cat([top, torch.cat([corner, lower_inverse], -1)], -2)


class UnitLowerInverse(torch.autograd.Function):
    """(I + L)^-1 for strictly lower triangular L [..., n, n]; the gradient needs two products only."""

    @staticmethod
    def forward(ctx, lower: torch.Tensor) -> torch.Tensor:
        inverse = _invert(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ grad @ transposed).tril(-1)


def _scan(transition: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """States before each chunk: S[0] = 0, S[i + 1] = transition[i] S[i] + update[i]; all [heads, chunks, d, e]."""
    states = [torch.zeros_like(update[:, 0])]
    for i in range(update.shape[1] - 1):
        states.append(torch.baddbmm(update[:, i], transition[:, i], states[-1]))
    return torch.stack(states, 1)


def gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, chunk: int = 64
) -> torch.Tensor:
    """q, k [B, H, T, D] (normalised, q scaled), v [B, H, T, E], g, beta [B, H, T], all fp32 -> [B, H, T, E]."""
    batch, heads, length, dim = k.shape
    pad = -length % chunk
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        g, beta = (F.pad(x, (0, pad)) for x in (g, beta))
    q, k, v = (x.reshape(batch * heads, -1, chunk, x.shape[-1]) for x in (q, k, v))
    g, beta = (x.reshape(batch * heads, -1, chunk, 1) for x in (g, beta))
    log_decay = g.cumsum(2)
    seen = torch.ones(chunk, chunk, device=q.device, dtype=torch.bool).tril()
    pairwise = (log_decay - log_decay.transpose(2, 3)).masked_fill(~seen, float("-inf")).exp()
    decay, rest = log_decay.exp(), (log_decay[:, :, -1:] - log_decay).exp()
    inverse = UnitLowerInverse.apply(((k * beta) @ k.transpose(2, 3) * pairwise).tril(-1))
    new_values = inverse @ (v * beta)  # before subtracting what the incoming state predicts
    reading = inverse @ (k * beta * decay)  # how a chunk reads the incoming state
    writing = (k * rest).transpose(2, 3)
    keep = torch.eye(dim, device=q.device, dtype=q.dtype) * decay[:, :, -1:]
    states = _scan(keep - writing @ reading, writing @ new_values)
    written = new_values - reading @ states
    out = (q * decay) @ states + (q @ k.transpose(2, 3) * pairwise) @ written
    return out.reshape(batch, heads, length + pad, -1)[:, :, :length]
