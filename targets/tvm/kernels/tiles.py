"""A tile of 16 output rows times a few rows of x: the inner loops of `linear` and of the experts.

The sum over K runs in one chain, in order, whatever the number of rows: a token gets the same bits alone or in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tvm.tirx.script.builder import ir as T

from qcn_compile.targets.tvm.kernels import math
from qcn_compile.targets.tvm.kernels.core import (
    Array,
    Arrays,
    Expr,
    Machine,
    f32,
    i32,
    let,
    loop,
    prefetch,
    splat,
    vector,
    when,
    wide,
)

TILE, GROUP = 16, 32
AHEAD = 4096  # bytes of the next expert asked for while the last tile of one is read
BYTES = {"float32": 4, "uint16": 2, "int8": 1, "uint8": 1}
CODES = {"f32": "float32", "bf16": "uint16", "int8": "int8", "int4": "uint8"}


class Tile(Protocol):
    """A weight cut into tiles of 16 rows. A lone token takes `together` of them at once."""

    together: int

    def multiply(self, tiles: list[Expr], rows: list[Expr], stride: int, acc: Array) -> None:
        """acc[i, r] = W[tiles[i]] x[rows[r]], acc [tiles, rows, 16]; `stride` between f32 rows of x, 0 when dense."""
        ...

    def start(self, tile: Expr) -> Expr:
        """Index in `w` where a tile, the first of a pair, starts."""
        ...


def ask_for(w: Array, start: Expr) -> None:
    """Ask for the first lines of weights that no stream leads to: from `start` on the processor goes on by itself."""
    with loop("line", AHEAD // 64) as line:
        prefetch(w, start + line * (64 // BYTES[w.dtype]))


def weight_params(format: str, activations: str) -> dict[str, str]:
    """Kernel parameters of a weight: codes, and the scales of codes that meet f32 activations."""
    return {"w": CODES[format]} | ({"s": "uint16"} if format in ("int8", "int4") and activations == "f32" else {})


def input_params(activations: str) -> dict[str, str]:
    """Kernel parameters of x: f32 rows; or int8 codes (four to an int32), scales, and zero point terms."""
    return {"x": "float32"} if activations == "f32" else {"xq": "int32", "xs": "float32", "xz": "int32"}


def block_sizes(m: Machine, activations: str, many: bool) -> tuple[int, ...]:
    """How many rows of x share a load of weights: as many as the registers hold, then fewer, then one. Steps of few
    tokens (batches, drafts to verify) have a pair, too: a block costs what it holds, not what is in it."""
    if not many:
        return 4, 2, 1
    if activations == "int8":
        return (8, 4, 1) if m.dot == 16 else (4, 1)  # as many as there are registers
    return (12, 4, 1) if m.lanes == 16 else (6, 1)


def for_blocks(tokens: Expr, sizes: tuple[int, ...], body: Callable[[Expr, int], None]) -> None:
    """body(first, size) over 0..tokens in falling sizes, a lone last token left out (see `for_lone`).

    The last block may reach past the end.
    """
    done = T.int32(0)
    for size in sizes[:-2]:
        with loop("b", T.floordiv(tokens - done, size)) as b:
            body(done + b * size, size)
        done = let("done", done + T.floordiv(tokens - done, size) * size)
    with loop("b", T.floordiv(tokens - done + sizes[-2] - 2, sizes[-2])) as b:
        body(done + b * sizes[-2], sizes[-2])


def for_lone(tokens: Expr, sizes: tuple[int, ...], body: Callable[[Expr], None]) -> None:
    """body(last) when `for_blocks` left one token over."""
    rest = tokens
    for size in sizes[:-1]:
        rest = T.floormod(rest, size)
    with when(rest == 1):
        body(let("last", tokens - 1))


def tile_range(tile: Tile, count: int, item: Expr) -> tuple[Expr, Expr, list[Expr]]:
    """Work item `item` of `count` tiles: first and end tile, and the tiles a lone token takes (the last may repeat)."""
    first = let("first_tile", item * tile.together)
    return (first, let("end_tile", T.min(first + tile.together, count)),
            [let(f"tile{i}", T.min(first + i, count - 1)) for i in range(tile.together)])


class FloatTile:
    """f32 activations; weights are widened or dequantised in registers.

    One chain of additions alone would wait for itself, so a lone token takes two tiles at once. They lie side by side,
    as one stream. `count`: tiles of one matrix.
    """

    together = 2

    def __init__(self, a: Arrays, m: Machine, depth: int, count: int, format: str) -> None:
        self.a, self.m, self.depth, self.count, self.format = a, m, depth, count, format
        self.coded, self.groups = format in ("int8", "int4"), -(-depth // GROUP)

    def multiply(self, tiles: list[Expr], rows: list[Expr], stride: int, acc: Array) -> None:
        for i in range(len(tiles) * len(rows)):
            acc[i * TILE, TILE] = f32(0.0, TILE)
        starts = [let(f"x{r}", row * (stride or self.depth)) for r, row in enumerate(rows)]
        if not self.coded:
            places = [self._place(tile) for tile in tiles]
            unroll = 8 if len(starts) == 1 else 4
            self._steps(0, self.depth, unroll, lambda k: [self._plain(*place, k) for place in places], starts, acc)
            return
        bases = [let("base", self.start(tile)) for tile in tiles]
        full = self.depth // GROUP
        if full:
            with loop("g", full) as g:
                self._group(tiles, bases, g, GROUP, starts, acc)
        if self.depth % GROUP:
            self._group(tiles, bases, full, self.depth % GROUP, starts, acc)

    def start(self, tile: Expr) -> Expr:
        size = self.groups * GROUP // (2 if self.format == "int4" else 1) if self.coded else self.depth
        return wide(tile) * (size * TILE)

    def _steps(self, first: Expr, count: int, unroll: int, weights: Callable[[Expr], list[list[Expr]]],
               starts: list[Expr], acc: Array) -> None:
        """acc += w(k) x[k] for k in first .. first+count, `unroll` at a time; weights(k) by tile and vector."""
        def step(k: Expr) -> None:
            lanes, tiles = self.m.lanes, weights(k)
            for r, start in enumerate(starts):
                x = splat(let("xk", self.a.x[start + k]), lanes)
                for i, w in enumerate(tiles):
                    for v in range(TILE // lanes):
                        at = (i * len(starts) + r) * TILE + v * lanes
                        acc[at, lanes] = T.fma(w[v], x, acc[at, lanes])

        if count >= unroll:
            with loop("k", count // unroll) as k:
                for u in range(unroll):
                    step(first + k * unroll + u)
        for u in range(count % unroll):
            step(first + count // unroll * unroll + u)

    def _place(self, tile: Expr) -> tuple[Expr, Expr]:
        """Where a tile starts, and how far its next input is: two tiles lie side by side, the last of an odd number
        alone."""
        within = T.floormod(tile, self.count)
        second = let("second", T.floormod(within, 2))
        start = let("base", self.start(tile - second) + second * TILE)
        if self.count % 2 == 0:
            return start, 2 * TILE
        return start, let("step", T.Select(within == self.count - 1, T.int32(TILE), T.int32(2 * TILE)))

    def _plain(self, base: Expr, step: Expr, k: Expr) -> list[Expr]:
        lanes = self.m.lanes
        at = let("at", base + k * step)
        raw = [self.a.w[at + v * lanes, lanes] for v in range(TILE // lanes)]
        return [let(f"w{v}", r if self.format == "f32" else math.widen(r)) for v, r in enumerate(raw)]

    def _group(self, tiles: list[Expr], bases: list[Expr], g: Expr, count: int, starts: list[Expr],
               acc: Array) -> None:
        scales = [load_scales(self.a.s, tile, self.groups, g, self.m.lanes) for tile in tiles]

        def weights(k: Expr) -> list[list[Expr]]:
            return [[let(f"w{v}", self._decoded(base, k, v, scale)) for v, scale in enumerate(row)]
                    for base, row in zip(bases, scales, strict=True)]

        self._steps(g * GROUP, count, 2, weights, starts, acc)

    def _decoded(self, base: Expr, k: Expr, v: int, scale: Expr) -> Expr:
        """Weights of input k for the v-th vector of rows, code * scale. For int4, nibble * scale - 8 * scale is the
        same number, as the fused product is exact."""
        lanes = self.m.lanes
        integer, real = vector("int32", lanes), vector("float32", lanes)
        if self.format == "int8":
            return T.Cast(real, T.Cast(integer, self.a.w[base + k * TILE + v * lanes, lanes])) * scale
        byte = T.Cast(integer, self.a.w[base + T.floordiv(k, 2) * TILE + v * lanes, lanes])
        nibble = T.bitwise_and(T.shift_right(byte, splat(T.floormod(k, 2) * 4, lanes)), i32(15, lanes))
        return T.fma(T.Cast(real, nibble), scale, scale * f32(-8.0, lanes))


def load_scales(s: Array, index: Expr, groups: int, g: Expr, lanes: int) -> list[Expr]:
    """The f16 scales of a tile's 16 rows in group g, as f32 vectors."""
    at = let("sat", wide(index) * (groups * TILE) + g * TILE)
    return [let(f"scale{v}", math.half(s[at + v * lanes, lanes])) for v in range(TILE // lanes)]
