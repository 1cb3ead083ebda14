"""Weights in the order kernels read them: one sequential stream, which the processor fetches ahead by itself.

    tiles    linear [N, K], experts [E, N, K]     gate_up  experts [E, 2I, H]: a tile is 8 gate rows and their 8 up rows
        f32, bf16        w [pair of tiles, K, 2, 16]; behind them [K, 16], the last tile of an odd number
        int8 x f32       w [tile, Kp, 16] int8                              s [tile, Kp/32, 16] f16
        int4 x f32       w [tile, Kp/2, 16]: low nibble k=2i, high 2i+1     s as above; nibbles are code + 8
        int8 x int8      w [tile, Kp/32, ...]: [8, 16, 4] int8, then the group's scales [16] f16
        int4 x int8      w [tile, Kp/32, ...]: [4, 16, 4], low nibbles k=8i..8i+3, high 8i+4..8i+7; then the scales
    rows     embedding table [V, H], f32 or bf16, as it is
    vector   anything, f32, as it is                channels  conv weight [C, W] as f32 [W, C]
    rope     rotary frequencies, f32, and a factor of cos and sin behind them, 1

N is padded with zero rows to a multiple of 16 (I to a multiple of 8), Kp is K padded to a multiple of 32.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import GROUP, Coded, Encoding, Weight, padded, quantize, quantized, to_bf16, wide

TILE = 16
HALF = TILE // 2
LAYOUTS = ("tiles", "gate_up", "rows", "vector", "channels", "rope")
BITS = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4}


def pack(layout: str, encoding: Encoding, weight: Weight) -> dict[str, np.ndarray]:
    """Part name -> flat array. Stacked experts are packed one by one."""
    if layout == "vector":
        return {"w": wide(weight).numpy().reshape(-1)}
    if layout == "rope":
        return {"w": np.append(wide(weight).numpy().reshape(-1), np.float32(1.0))}
    if layout == "channels":
        return {"w": wide(weight).numpy().T.reshape(-1)}
    if layout == "rows":
        return {"w": (to_bf16(weight) if encoding.format == "bf16" else wide(weight).numpy()).reshape(-1)}
    if layout not in LAYOUTS:
        raise LoweringError(f"no weight layout named {layout!r}; the CPU target packs {', '.join(LAYOUTS)}")
    if not isinstance(weight, Coded) and weight.ndim == 3:
        experts = [pack(layout, encoding, matrix) for matrix in weight]
        return {part: np.concatenate([expert[part] for expert in experts]) for part in experts[0]}
    return pack_tiles(encoding, interleave(weight) if layout == "gate_up" else weight)


def row_block(layout: str) -> int:
    """Rows of a matrix that `pack` can be given apart from the rest; 0: it wants the whole matrix."""
    return {"tiles": 2 * TILE, "rows": 1}.get(layout, 0)


def sizes(layout: str, encoding: Encoding, shape: tuple[int, ...]) -> dict[str, tuple[str, int]]:
    """Part name -> (element type, bytes) of what `pack` makes of a weight of that shape."""
    if layout in ("vector", "channels"):
        return {"w": ("f32", 4 * prod(shape))}
    if layout == "rope":
        return {"w": ("f32", 4 * (prod(shape) + min(prod(shape), 1)))}
    bits = BITS[encoding.format]
    if layout == "rows":
        return {"w": (encoding.format, prod(shape) * bits // 8)}
    rows, depth = shape[-2:]
    rows = 2 * padded(rows // 2, HALF) if layout == "gate_up" else padded(rows, TILE)
    count = prod(shape[:-2]) * rows
    if not quantized(encoding):
        return {"w": (encoding.format, count * depth * bits // 8)}
    codes, scales = count * padded(depth) * bits // 8, count * group_count(depth) * 2
    if encoding.activations == "int8":
        return {"w": (encoding.format, codes + scales)}
    return {"w": (encoding.format, codes), "s": ("f16", scales)}


def interleave(gate_up: Weight) -> Weight:
    """[2I, H], gate above up -> [2 ceil8(I), H], 8 gate rows and their 8 up rows in turn. Codes of rows stay codes."""
    if isinstance(gate_up, Coded) and quantized(gate_up.encoding):
        return replace(gate_up, codes=_in_turn(gate_up.codes), scales=_in_turn(gate_up.scales))
    return _in_turn(wide(gate_up))


def _in_turn(pair: Tensor) -> Tensor:
    width, depth = pair.shape[0] // 2, pair.shape[1]
    pair = torch.nn.functional.pad(pair.reshape(2, width, depth), (0, 0, 0, -width % HALF))
    return pair.reshape(2, -1, HALF, depth).transpose(0, 1).reshape(-1, depth)


def pack_tiles(encoding: Encoding, matrix: Weight) -> dict[str, np.ndarray]:
    """One [N, K] matrix as tiles, flat."""
    codes, scales = quantize(matrix, encoding)
    if scales is None or not quantized(encoding):
        return {"w": in_pairs(tiles_of(codes))}
    words = nibbles(codes, encoding.activations) if encoding.format == "int4" else codes
    scales_of = tiles_of(scales.view(np.uint16))
    if encoding.activations == "f32":
        return {"w": tiles_of(words).reshape(-1), "s": scales_of.reshape(-1)}
    codes_of = tiles_of(words.view(np.int32))  # four bytes of a row stay together
    parts = [x.reshape(*scales_of.shape[:2], -1).view(np.uint8) for x in (codes_of, scales_of)]
    return {"w": np.concatenate(parts, -1).reshape(-1)}


def in_pairs(tiles: np.ndarray) -> np.ndarray:
    """[tiles, K, 16] -> flat, two tiles side by side, the last of an odd number alone."""
    even = len(tiles) // 2 * 2
    pairs = tiles[:even].reshape(-1, 2, *tiles.shape[1:]).swapaxes(1, 2)
    return np.concatenate([pairs.reshape(-1), tiles[even:].reshape(-1)])


def tiles_of(matrix: np.ndarray) -> np.ndarray:
    """[N, K] -> [ceil(N/16), K, 16], zero rows added."""
    rows, depth = matrix.shape
    if rows % TILE:
        matrix = np.concatenate([matrix, np.zeros((-rows % TILE, depth), matrix.dtype)])
    return np.ascontiguousarray(matrix.reshape(-1, TILE, depth).swapaxes(1, 2))


def nibbles(codes: np.ndarray, activations: str) -> np.ndarray:
    """Codes -8..7 [N, K] in pairs as bytes (first + 8) | (second + 8) << 4, [N, K/2]: neighbours with f32 activations;
    with int8 ones the first four of eight values with the other four."""
    biased = (codes + 8).view(np.uint32 if activations == "int8" else np.uint8)
    return np.asarray(biased[:, 0::2] | np.left_shift(biased[:, 1::2], 4)).view(np.uint8)


def tile_count(rows: int) -> int:
    """Tiles of a matrix with that many output rows."""
    return -(-rows // TILE)


def group_count(depth: int) -> int:
    """Scale groups of one output row."""
    return -(-depth // GROUP)
