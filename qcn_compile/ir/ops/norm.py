"""Normalisation rows. Statistics are taken in fp32; the result has the dtype of x."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qcn_compile.ir.optable import op, same


def rms(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """The formula shared by every norm here, in fp32."""
    x32 = x.float()
    return x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * w.float()


@op("rms_norm", "x, w", eps=float, infer=same())
def rms_norm(x: Tensor, w: Tensor, *, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * w over the last axis. x [..., H], w [H] (zero-centred weights arrive as 1+w).

    (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019)
    """
    return rms(x, w, eps).to(x.dtype)


@op("add_rms_norm", "x, r, w", eps=float, infer=lambda x, r, w, **_: (x, x))
def add_rms_norm(x: Tensor, r: Tensor, w: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """(s, y) with s = x + r and y = rms_norm(s, w). x, r [T, H], w [H]."""
    total = x + r
    return total, rms(total, w, eps).to(x.dtype)


@op("gated_rms_norm", "x, z, w", eps=float, infer=same())
def gated_rms_norm(x: Tensor, z: Tensor, w: Tensor, *, eps: float) -> Tensor:
    """y = rms_norm(x, w) * silu(z), gate after the norm. x, z [..., D], w [D]."""
    return (rms(x, w, eps) * F.silu(z.float())).to(x.dtype)
