"""NVFP4 codes made with NumPy alone: the bytes that `qcn_compile/ir/fp4.py` makes with PyTorch."""

from __future__ import annotations

import numpy as np

GROUP = 16
MIDDLES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)  # halfway goes to the even code
BOUNDS = np.where(np.arange(7) % 2 == 1, np.nextafter(MIDDLES, np.float32(0)), MIDDLES)
LARGEST = np.float32(6 * 448)


def e4m3(x: np.ndarray) -> np.ndarray:
    """Codes u8 of f32 numbers, to nearest even; sizes beyond 448 become 448."""
    size = np.minimum(np.abs(x), np.float32(448))
    exponent = np.clip(np.frexp(size)[1] - 1, -6, 8)
    steps = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int32)
    codes = np.minimum(np.where(steps > 0, (exponent + 6) * 8 + steps, 0), 0x7E)
    return (codes | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def quantize(w: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f32 [N, K] -> codes u8 [N, 8 ceil(K/16)], e4m3 scales u8 [N, ceil(K/16)], f32 [1]. values: f32 of e4m3 codes."""
    rows, columns = w.shape
    groups = np.pad(w, ((0, 0), (0, -columns % GROUP))).reshape(rows, -1, GROUP)
    most = np.abs(groups).max(-1)
    whole = most.max() / LARGEST
    unit = whole if whole > 0 else np.float32(1)
    scales = e4m3(most / np.float32(6) / unit)
    step = values[scales] * unit
    x = groups * np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)[..., None]
    codes = (np.searchsorted(BOUNDS, np.abs(x)) + 8 * (x < 0)).astype(np.uint8).reshape(rows, -1)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales, np.array([whole], np.float32)
