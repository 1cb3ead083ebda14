"""FP8 weights: e4m3 codes with one f32 scale per block of 128 x 128, as in published FP8 checkpoints.

weight = code * scale; `scale` is what those checkpoints call weight_scale_inv.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
LARGEST = np.float32(448.0)


def _table() -> np.ndarray:
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    size = np.where(exponent > 0, np.ldexp(8.0 + fraction, exponent - 10), np.ldexp(1.0 * fraction, -9))
    size = np.where((codes & 0x7F) == 0x7F, np.nan, size)
    return np.where(codes & 0x80, -size, size).astype(np.float32)


VALUES = _table()


def quantize(w: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """f32 [..., N, K] -> codes u8 [..., N, K], scales f32 [..., ceil(N/128), ceil(K/128)] = max|block| / 448."""
    rows, columns = w.shape[-2:]
    full = torch.nn.functional.pad(w, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = full.reshape(*w.shape[:-2], full.shape[-2] // BLOCK, BLOCK, full.shape[-1] // BLOCK, BLOCK)
    scales = blocks.abs().amax((-3, -1)) / float(LARGEST)
    inverse = torch.where(scales > 0, 1 / scales, 0)
    scaled = (blocks * inverse[..., None, :, None]).clamp_(-float(LARGEST), float(LARGEST))
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).reshape(full.shape)[..., :rows, :columns]
    return codes.contiguous().numpy(), scales.numpy()


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The f32 weights that codes stand for."""
    return VALUES[codes] * spread(scales, codes.shape)


def spread(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every element's scale, [..., N, K]."""
    return scales.repeat(BLOCK, -2)[..., :shape[-2], :].repeat(BLOCK, -1)[..., :shape[-1]]
