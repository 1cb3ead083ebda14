"""Weights in the order kernels read them: one sequential stream a tile of 16 output rows. NumPy only.

    tiles    linear [N, K], experts [E, N, K]     gate_up  experts [E, 2I, H]: a tile is 8 gate rows and their 8 up rows
        f32, bf16        w [tile, K, 16]
        int8 x f32       w [tile, Kp, 16] int8                              s [tile, Kp/32, 16] f16
        int4 x f32       w [tile, Kp/2, 16]: low nibble k=2i, high 2i+1     s as above; nibbles are code + 8
        int8 x int8      w [tile, Kp/4, 16, 4] int8                         s as above
        int4 x int8      w [tile, Kp/8, 16, 4]: low nibbles k=8i..8i+3, high 8i+4..8i+7
    rows     embedding table [V, H], f32 or bf16, as it is
    vector   anything, f32, as it is                channels  conv weight [C, W] as f32 [W, C]

N is padded with zero rows to a multiple of 16 (I to a multiple of 8), Kp is K padded to a multiple of 32.
"""

from __future__ import annotations

import numpy as np

from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import GROUP, Encoding, padded, quantize, quantized, to_bf16

TILE = 16
HALF = TILE // 2
ALIGNMENT = 64
LAYOUTS = ("tiles", "gate_up", "rows", "vector", "channels")


def pack(layout: str, encoding: Encoding, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Part name -> flat array, padded with zeros to a multiple of 64 bytes. Stacked experts are packed one by one."""
    if layout == "vector":
        return {"w": flat(np.asarray(weight, np.float32))}
    if layout == "channels":
        return {"w": flat(np.ascontiguousarray(np.asarray(weight, np.float32).T))}
    if layout == "rows":
        return {"w": flat(to_bf16(weight) if encoding.format == "bf16" else np.asarray(weight, np.float32))}
    if layout not in LAYOUTS:
        raise LoweringError(f"no weight layout named {layout!r}; the CPU target packs {', '.join(LAYOUTS)}")
    stack = weight if weight.ndim == 3 else weight[None]
    parts: dict[str, np.ndarray] = {}
    for index, matrix in enumerate(stack):
        rows = interleave(matrix) if layout == "gate_up" else matrix
        for part, tiles in pack_tiles(encoding, rows).items():
            if index == 0:
                parts[part] = np.zeros((len(stack), tiles.size), tiles.dtype)
            parts[part][index] = tiles
    return {part: flat(data) for part, data in parts.items()}


def flat(data: np.ndarray) -> np.ndarray:
    """1-D, a multiple of 64 bytes."""
    line = np.ascontiguousarray(data).reshape(-1)
    lack = -line.nbytes % ALIGNMENT // line.itemsize
    return line if lack == 0 else np.concatenate([line, np.zeros(lack, line.dtype)])


def interleave(gate_up: np.ndarray) -> np.ndarray:
    """[2I, H], gate above up -> [2 ceil8(I), H], 8 gate rows and their 8 up rows in turn."""
    width, depth = gate_up.shape[0] // 2, gate_up.shape[1]
    pair = np.zeros((2, padded(width, HALF), depth), np.float32)
    pair[:, :width] = np.asarray(gate_up, np.float32).reshape(2, width, depth)
    return pair.reshape(2, -1, HALF, depth).swapaxes(0, 1).reshape(-1, depth)


def pack_tiles(encoding: Encoding, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """One [N, K] matrix as tiles, flat."""
    codes, scales = quantize(matrix, encoding)
    if scales is None or not quantized(encoding):
        return {"w": tiles_of(codes).reshape(-1)}
    blocks = tiles_of(codes)  # [tile, Kp, 16]
    if encoding.activations == "int8":
        blocks = blocks.reshape(len(blocks), -1, 4, TILE).swapaxes(2, 3)  # [tile, Kp/4, 16, 4]
    if encoding.format == "int4":
        blocks = nibbles(blocks)
    return {"w": np.ascontiguousarray(blocks).reshape(-1), "s": tiles_of(scales.view(np.uint16)).reshape(-1)}


def tiles_of(matrix: np.ndarray) -> np.ndarray:
    """[N, K] -> [ceil(N/16), K, 16], zero rows added."""
    rows, depth = matrix.shape
    if rows % TILE:
        matrix = np.concatenate([matrix, np.zeros((-rows % TILE, depth), matrix.dtype)])
    return np.ascontiguousarray(matrix.reshape(-1, TILE, depth).swapaxes(1, 2))


def nibbles(blocks: np.ndarray) -> np.ndarray:
    """Codes -8..7 in pairs along axis 1 as bytes: (first + 8) | (second + 8) << 4."""
    biased = (blocks + 8).astype(np.uint8)
    return biased[:, 0::2] | (biased[:, 1::2] << 4)


def tile_count(rows: int) -> int:
    """Tiles of a matrix with that many output rows."""
    return -(-rows // TILE)


def group_count(depth: int) -> int:
    """Scale groups of one output row."""
    return -(-depth // GROUP)
