"""Weight layouts of the GPU kernels.

    matrix    w: bf16 bits or e4m3 codes, row-major as in the checkpoint ([N, K], experts stacked [E, N, K]);
              s (fp8 only): f32 [ceil(N/128), ceil(K/128)], stacked likewise
    vector    w: f32
    channels  w: f32 [W, C], the taps of a convolution
"""

from __future__ import annotations

import numpy as np

from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import Encoding, quantize, to_bf16

ALIGNMENT = 64
LAYOUTS = ("matrix", "vector", "channels")


def pack(layout: str, encoding: Encoding, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Part name -> flat array, padded with zeros to a multiple of 64 bytes."""
    if layout == "vector":
        return {"w": flat(np.asarray(weight, np.float32))}
    if layout == "channels":
        return {"w": flat(np.ascontiguousarray(np.asarray(weight, np.float32).T))}
    if layout != "matrix":
        raise LoweringError(f"no weight layout named {layout!r}; the GPU targets pack {', '.join(LAYOUTS)}")
    if encoding.format == "bf16":
        return {"w": flat(to_bf16(weight))}
    codes, scales = quantize(weight, encoding)
    assert scales is not None
    return {"w": flat(codes), "s": flat(scales)}


def sizes(layout: str, encoding: Encoding, shape: tuple[int, ...]) -> dict[str, tuple[str, int]]:
    """Part name -> (element type, bytes) of what `pack` makes of a weight of that shape."""
    count = int(np.prod(shape))
    if layout in ("vector", "channels"):
        return {"w": ("f32", whole(4 * count))}
    if encoding.format == "bf16":
        return {"w": ("bf16", whole(2 * count))}
    blocks = int(np.prod(shape[:-2], dtype=np.int64)) * -(-shape[-2] // 128) * -(-shape[-1] // 128)
    return {"w": ("fp8", whole(count)), "s": ("scale", whole(4 * blocks))}


def whole(nbytes: int) -> int:
    """Rounded up to whole lines of 64 bytes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def flat(data: np.ndarray) -> np.ndarray:
    """1-D, a multiple of 64 bytes."""
    line = np.ascontiguousarray(data).reshape(-1)
    lack = -line.nbytes % ALIGNMENT // line.itemsize
    return line if lack == 0 else np.concatenate([line, np.zeros(lack, line.dtype)])
