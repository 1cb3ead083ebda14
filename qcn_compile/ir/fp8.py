"""FP8 weights: e4m3 codes with one f32 scale per block of 128 x 128, as in published FP8 checkpoints.

weight = code * scale; `scale` is what those checkpoints call weight_scale_inv. Plain NumPy.
"""

from __future__ import annotations

import numpy as np

BLOCK = 128
LARGEST = np.float32(448.0)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Codes (u8) of f32 rounded to e4m3, nearest even, clamped to +-448. NaN stays NaN."""
    x = np.asarray(x, np.float32)
    size = np.minimum(np.abs(x), LARGEST)
    exponent = np.clip(np.frexp(size)[1] - 1, -6, 8)  # subnormals share the exponent -6
    steps = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int32)  # 8..16 in a binade, 0..8 below all of them
    code = np.where(steps > 0, (exponent + 6) * 8 + steps, 0)
    code = np.where(np.isnan(x), 0x7F, np.minimum(code, 0x7E))
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def _table() -> np.ndarray:
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    size = np.where(exponent > 0, np.ldexp(8.0 + fraction, exponent - 10), np.ldexp(1.0 * fraction, -9))
    size = np.where((codes & 0x7F) == 0x7F, np.nan, size)
    return np.where(codes & 0x80, -size, size).astype(np.float32)


VALUES = _table()


def quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [..., N, K] -> codes u8 [..., N, K], scales f32 [..., ceil(N/128), ceil(K/128)] = max|block| / 448."""
    w = np.asarray(w, np.float32)
    rows, columns = (np.arange(0, n, BLOCK) for n in w.shape[-2:])
    most = np.maximum.reduceat(np.maximum.reduceat(np.abs(w), rows, -2), columns, -1)
    scales = (most / LARGEST).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    return to_e4m3(w * spread(inverse, w.shape)), scales


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The f32 weights that codes stand for."""
    return VALUES[codes] * spread(scales, codes.shape)


def spread(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every element's scale, [..., N, K]."""
    return scales.repeat(BLOCK, -2)[..., :shape[-2], :].repeat(BLOCK, -1)[..., :shape[-1]]
