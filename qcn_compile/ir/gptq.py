"""GPTQ: int4 codes of a matrix chosen by what they do to its outputs, not to its weights (Frantar et al. 2022).

Columns are rounded one after the other; the error of each, seen through the inverse Hessian of the inputs, is made up
for by the columns that are still to come. Scales are chosen a group at a time, the best of a few under the diagonal of
the Hessian, of weights that bear the errors so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcn_compile.ir.encoding import F16_MAX, GROUP, LIMITS, TINY, Coded, Encoding

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it
SHRINK = tuple(1 - 0.05 * i for i in range(10))  # of a group's largest value that its scale is tried for


def hessian(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """f64 [K, K] = sum over tokens of w^2 x x^T. x [T, K], weights [T] of the outputs (None: 1)."""
    wide = x.double() if weights is None else x.double() * weights.double()[:, None]
    return wide.T @ wide


def quantize(w: Tensor, h: Tensor, group: int = GROUP) -> Coded:
    """Codes and f16 scales (as `encoding.quantize` makes them) of w f32 [N, K] for inputs of Hessian h f64 [K, K].

    `group`: values that share a scale, a multiple of 32; it is repeated for each 32.
    """
    size, h = w.shape[1], h.clone()
    lack = -size % group
    if not h.any():
        h = torch.eye(size, dtype=h.dtype)
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    w = torch.nn.functional.pad(w.double(), (0, lack))
    upper = torch.eye(size + lack, dtype=torch.float64)
    upper[:size, :size] = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    weight = torch.nn.functional.pad(h.diagonal(), (0, lack))
    codes, scales = [], []
    for start in range(0, size + lack, group):
        at = slice(start, start + group)
        scale = _scales(w[:, at], weight[at])
        made, errors = _group(w[:, at], scale, upper[at, at])
        w[:, start + group:] -= errors @ upper[at, start + group:]
        codes.append(made)
        scales.append(scale)
    stored, spread = -(-size // GROUP), torch.stack(scales, 1).repeat_interleave(group // GROUP, 1)
    return Coded(torch.cat(codes, 1)[:, :stored * GROUP].contiguous(), spread[:, :stored].contiguous(),
                 Encoding("int4", GROUP), size)


def _group(w: Tensor, scale: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """(codes i8 [N, G], errors f64 [N, G], each divided by the diagonal) of a group's columns."""
    w, wide = w.clone(), scale.double()
    errors = torch.empty_like(w)
    codes = torch.empty(w.shape, dtype=torch.int8)
    for i in range(w.shape[1]):
        code = _codes(w[:, i], wide)
        error = (w[:, i] - code * wide) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
        errors[:, i], codes[:, i] = error, code.to(torch.int8)
    return codes, errors


def _codes(w: Tensor, scale: Tensor) -> Tensor:
    return (w / torch.where(scale.abs() > TINY, scale, torch.inf)).round().clamp(*LIMITS["int4"])


def _scales(w: Tensor, weight: Tensor) -> Tensor:
    """f16 [N]: of -m/8 and m/8 for shares of the largest value m, what rounds w [N, G] with the least error."""
    most = w.abs().amax(1)
    tried = torch.stack([most * share / sign for share in SHRINK for sign in (-8, 8)])
    tried = tried.clamp(-F16_MAX, F16_MAX).half()
    wide = tried.double()[..., None]
    error = ((w - _codes(w[None], wide) * wide) ** 2 * weight).sum(-1)
    return tried.gather(0, error.argmin(0)[None])[0]
