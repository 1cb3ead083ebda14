"""INT4 weights of GPU experts: codes -8..7, one f16 scale for 128 values of a row.

weight = code * scale; scale = -(the value of largest magnitude) / 8, as in `encoding`'s groups of 32. Two codes share a
byte as code + 8, the first in its low half; a row is filled up with zeros to whole groups.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GROUP = 128
TINY, F16_MAX = 1e-30, 65504.0


def quantize(w: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """f32 [..., N, K] -> bytes u8 [..., N, 64 ceil(K/128)], f16 scales [..., N, ceil(K/128)]."""
    groups = torch.nn.functional.pad(w, (0, -w.shape[-1] % GROUP)).reshape(*w.shape[:-1], -1, GROUP)
    most, least = groups.amax(-1), groups.amin(-1)
    scales = (torch.where(most >= -least, most, least) / -8).clamp_(-F16_MAX, F16_MAX).half()
    wide = scales.float()
    inverse = torch.where(wide.abs() > TINY, 1 / wide, 0)
    codes = ((groups * inverse[..., None]).round_().clamp_(-8, 7) + 8).to(torch.uint8).reshape(*w.shape[:-1], -1)
    return _packed(codes), scales.numpy()


def regroup(codes: Tensor, scales: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """What `quantize` gives, of codes i8 [..., N, K] that are chosen already and f16 scales [..., N, K/32] of theirs,
    K padded to 32. None where a group of 128 has several scales."""
    lack = -scales.shape[-1] % (GROUP // 32)
    codes = torch.nn.functional.pad(codes, (0, 32 * lack))
    last = scales[..., -1:].expand(*scales.shape[:-1], lack)
    groups = torch.cat([scales, last], -1).reshape(*scales.shape[:-1], -1, GROUP // 32)
    if not bool((groups == groups[..., :1]).all()):
        return None
    return _packed((codes + 8).to(torch.uint8)), groups[..., 0].contiguous().numpy()


def _packed(codes: Tensor) -> np.ndarray:
    """Codes 0..15 [..., N, K], two a byte."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous().numpy()


def dequantize(codes: np.ndarray, scales: np.ndarray, size: int) -> np.ndarray:
    """The f32 weights [..., N, size] that codes stand for."""
    numbers = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1).astype(np.float32) - 8
    product: np.ndarray = numbers * scales.astype(np.float32).repeat(GROUP, -1)
    return product[..., :size]
