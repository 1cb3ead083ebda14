"""NVFP4 weights: e2m1 codes, an e4m3 scale for 16 values of a row, one f32 scale for a whole matrix.

weight = code * scale * whole. Two codes share a byte, the first in its low half; a row is filled up with zeros.
Source: NVIDIA's description of NVFP4; published NVFP4 checkpoints store weights so.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcn_compile.ir import fp8

GROUP = 16
SIZES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([SIZES, -SIZES])
MIDDLES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)  # halfway goes to the even code
BOUNDS = np.where(np.arange(7) % 2 == 1, np.nextafter(MIDDLES, np.float32(0)), MIDDLES)
LARGEST = 6.0 * 448.0


def quantize(w: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f32 [..., N, K] -> codes u8 [..., N, 8 ceil(K/16)], e4m3 scales u8 [..., N, ceil(K/16)], f32 [...]."""
    rows, columns = w.shape[-2:]
    groups = torch.nn.functional.pad(w, (0, -columns % GROUP)).reshape(*w.shape[:-1], -1, GROUP)
    most = groups.abs().amax(-1)
    whole = most.amax((-2, -1)) / LARGEST
    unit = torch.where(whole > 0, whole, 1.0)[..., None, None]
    scales = (most / 6.0 / unit).clamp_(max=448.0).to(torch.float8_e4m3fn)
    step = scales.float() * unit
    x = groups * torch.where(step > 0, 1 / step, 0.0)[..., None]
    size = torch.bucketize(x.abs(), torch.from_numpy(BOUNDS), out_int32=True).to(torch.uint8)
    codes = (size + 8 * (x < 0).to(torch.uint8)).reshape(*w.shape[:-2], rows, -1)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed.contiguous().numpy(), scales.view(torch.uint8).numpy(), whole.numpy()


def dequantize(codes: np.ndarray, scales: np.ndarray, whole: np.ndarray, size: int) -> np.ndarray:
    """The f32 weights [..., N, size] that codes stand for."""
    numbers = VALUES[np.stack([codes & 15, codes >> 4], -1)].reshape(*codes.shape[:-1], -1)
    factors = (fp8.VALUES[scales] * whole[..., None, None]).repeat(GROUP, -1)
    product: np.ndarray = numbers * factors
    return product[..., :size]
