"""Weight layouts of the GPU kernels.

    matrix    w: bf16 bits or e4m3 codes, row-major as in the checkpoint ([N, K], experts stacked [E, N, K]);
              s (fp8 only): f32 [ceil(N/128), ceil(K/128)], stacked likewise;
              nvfp4: w two codes a byte, s e4m3 [N, ceil(K/16)], g one f32 a matrix (see ir/fp4.py);
              int4-g128: w two codes a byte, s f16 [N, ceil(K/128)] (see ir/int4.py)
    vector    w: f32
    channels  w: f32 [W, C], the taps of a convolution
    rope      w: f32 [R/2 + 1], rotary frequencies and a factor of cos and sin, 1
"""

from __future__ import annotations

from math import prod

import numpy as np

from qcn_compile.errors import LoweringError
from qcn_compile.ir import fp4, int4
from qcn_compile.ir.encoding import Encoding, Weight, quantize, quantize_int4, to_bf16, wide
from qcn_compile.ir.fp8 import BLOCK

LAYOUTS = ("matrix", "vector", "channels", "rope")


def pack(layout: str, encoding: Encoding, weight: Weight) -> dict[str, np.ndarray]:
    """Part name -> flat array."""
    if layout == "vector":
        return {"w": wide(weight).numpy().reshape(-1)}
    if layout == "rope":
        return {"w": np.append(wide(weight).numpy().reshape(-1), np.float32(1.0))}
    if layout == "channels":
        return {"w": wide(weight).numpy().T.reshape(-1)}
    if layout != "matrix":
        raise LoweringError(f"no weight layout named {layout!r}; the GPU targets pack {', '.join(LAYOUTS)}")
    if encoding.format == "bf16":
        return {"w": to_bf16(weight).reshape(-1)}
    if encoding.format == "int4-g128":
        return {part: x.reshape(-1) for part, x in zip("ws", quantize_int4(weight), strict=True)}
    if encoding.format == "nvfp4":
        return {part: x.reshape(-1) for part, x in zip("wsg", fp4.quantize(wide(weight)), strict=True)}
    codes, scales = quantize(weight, encoding)
    assert scales is not None
    return {"w": codes.reshape(-1), "s": scales.reshape(-1)}


def row_block(layout: str, encoding: Encoding) -> int:
    """Rows of a matrix that `pack` can be given apart from the rest; 0: it wants the whole matrix."""
    return BLOCK if layout == "matrix" and encoding.format != "nvfp4" else 0


def sizes(layout: str, encoding: Encoding, shape: tuple[int, ...]) -> dict[str, tuple[str, int]]:
    """Part name -> (element type, bytes) of what `pack` makes of a weight of that shape."""
    if layout in ("vector", "channels"):
        return {"w": ("f32", 4 * prod(shape))}
    if layout == "rope":
        return {"w": ("f32", 4 * (prod(shape) + min(prod(shape), 1)))}
    if encoding.format == "bf16":
        return {"w": ("bf16", 2 * prod(shape))}
    if encoding.format == "int4-g128":
        groups = prod(shape[:-1]) * -(-shape[-1] // int4.GROUP)
        return {"w": ("fp4", groups * int4.GROUP // 2), "s": ("f16", 2 * groups)}
    if encoding.format == "nvfp4":
        groups = prod(shape[:-1]) * -(-shape[-1] // fp4.GROUP)
        matrices = prod(shape[:-2]) * min(shape[-2], 1)
        return {"w": ("fp4", groups * fp4.GROUP // 2), "s": ("e4m3", groups), "g": ("scale", 4 * matrices)}
    blocks = prod(shape[:-2]) * -(-shape[-2] // BLOCK) * -(-shape[-1] // BLOCK)
    return {"w": ("fp8", prod(shape)), "s": ("scale", 4 * blocks)}
