"""INT4 codes made with NumPy alone: the bytes that `qcn_compile/ir/int4.py` makes with PyTorch."""

from __future__ import annotations

import numpy as np

GROUP = 128
TINY, F16_MAX = np.float32(1e-30), np.float32(65504)


def quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [N, K] -> bytes u8 [N, 64 ceil(K/128)], f16 scales [N, ceil(K/128)]."""
    rows, columns = w.shape
    groups = np.pad(w, ((0, 0), (0, -columns % GROUP))).reshape(rows, -1, GROUP)
    most, least = groups.max(-1), groups.min(-1)
    scales = np.clip(np.where(most >= -least, most, least) / np.float32(-8), -F16_MAX, F16_MAX).astype(np.float16)
    wide = scales.astype(np.float32)
    inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=np.abs(wide) > TINY)
    codes = (np.clip(np.rint(groups * inverse[..., None]), -8, 7) + 8).astype(np.uint8).reshape(rows, -1)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales
