"""Tiles with int8 activations: exact integer sums inside a group of 32, one f32 chain over the groups.

    acc[n] += scale_w[n, g] * (sum_k code_w[n, k] code_x[k] * scale_x[g])

AVX2, both forms of VNNI, NEON and ARM's dot product compute the same integers, so all give the same bits. Where an
instruction wants unsigned codes, the weight is stored or made as code + zero, and `xz` = -zero * (sum of the codes of x
in the group) takes it out again.
"""

from __future__ import annotations

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
    local,
    loop,
    splat,
    wide,
)
from qcn_compile.targets.tvm.kernels.tiles import GROUP, TILE, FloatTile, Tile

LINE = 64  # bytes: 16 rows of 4 int8 codes, or of 8 int4 codes


def make_tile(a: Arrays, m: Machine, depth: int, count: int, format: str, activations: str) -> Tile:
    """The tile for a format on a machine; `count` of them in a matrix."""
    if activations == "f32":
        return FloatTile(a, m, depth, count, format)
    if m.arm:
        return ArmTile(a, depth, format, 4) if m.dot else NeonTile(a, depth, format, 4)
    return VnniTile(a, depth, format, m.dot) if m.dot else Avx2Tile(a, depth, format, 8)


class IntegerTile:
    """What all share: the walk over groups, and the f32 chain in vectors of `lanes` rows."""

    together = 1  # sums inside a group are many short chains already

    def __init__(self, a: Arrays, depth: int, format: str, lanes: int) -> None:
        self.a, self.format, self.groups, self.lanes = a, format, -(-depth // GROUP), lanes
        self.lines = GROUP * TILE // LINE // (2 if format == "int4" else 1)  # lines of 64 bytes in a group
        self.size = self.lines * LINE + 2 * TILE  # bytes of a group, its scales behind it

    def multiply(self, tiles: list[Expr], rows: list[Expr], stride: int, acc: Array) -> None:
        """acc[i, r] = W[tiles[i]] x[rows[r]]. Codes of x are dense, so `stride` is not used."""
        for i in range(len(tiles) * len(rows)):
            acc[i * TILE, TILE] = f32(0.0, TILE)
        bases = [let("base", self.start(tile)) for tile in tiles]
        xq = [let(f"q{r}", row * (self.groups * GROUP // 4)) for r, row in enumerate(rows)]
        xs = [let(f"d{r}", row * self.groups) for r, row in enumerate(rows)]
        sums = local("sums", "int32", len(rows) * TILE)
        with loop("g", self.groups) as g:
            for i, base in enumerate(bases):
                at = let("wat", base + g * self.size)
                self.dot(at, [q + g * (GROUP // 4) for q in xq], [self.a.xz[d + g] for d in xs], sums)
                self._add(self._scales(at + self.lines * LINE), [d + g for d in xs], sums, acc, i * len(rows) * TILE)

    def start(self, tile: Expr) -> Expr:
        return wide(tile) * (self.groups * self.size)

    def _scales(self, at: Expr) -> list[Expr]:
        """The f16 scales of 16 rows from byte `at` on, as f32 vectors."""
        raw = [self.a.w[at + 2 * v, 2 * self.lanes] for v in range(0, TILE, self.lanes)]
        return [let("scale", math.half(T.reinterpret(f"uint16x{self.lanes}", bytes_))) for bytes_ in raw]

    def _add(self, scales: list[Expr], xs: list[Expr], sums: Array, acc: Array, first: int) -> None:
        """acc[first:] += scale_w * (sums * scale_x)."""
        for r, d in enumerate(xs):
            x = splat(let("x", self.a.xs[d]), self.lanes)
            for v, scale in enumerate(scales):
                at = r * TILE + v * self.lanes
                value = T.Cast(f"float32x{self.lanes}", sums[at, self.lanes]) * x
                acc[first + at, self.lanes] = T.fma(scale, value, acc[first + at, self.lanes])

    def dot(self, at: Expr, xq: list[Expr], xz: list[Expr], sums: Array) -> None:
        """sums[r] = integer products of one group: weights from byte `at`, x from int32 xq[r], zero terms xz[r]."""
        raise NotImplementedError


class DotTile(IntegerTile):
    """Four products of a row in one lane of one instruction. int4 comes as nibbles that are 8 too large."""

    def dot(self, at: Expr, xq: list[Expr], xz: list[Expr], sums: Array) -> None:
        for r, z in enumerate(xz):
            sums[r * TILE, TILE] = splat(z if self.biased else T.int32(0), TILE)
        for b in range(self.lines):
            for v in range(TILE // self.lanes):
                raw = let("raw", self.a.w[at + b * LINE + v * 4 * self.lanes, 4 * self.lanes])
                for i, codes in enumerate(self._codes(raw)):
                    w = let("codes", codes)
                    for r, q in enumerate(xq):
                        x = self.a.xq[q + (b * 2 + i if self.format == "int4" else b)]
                        lane = r * TILE + v * self.lanes
                        sums[lane, self.lanes] = self._product(sums[lane, self.lanes], w, self._four(x))

    @property
    def biased(self) -> bool:
        """Whether the zero terms belong into the sums."""
        return self.format == "int4"

    def _codes(self, raw: Expr) -> list[Expr]:
        if self.format == "int8":
            return [raw]
        size = 4 * self.lanes
        high = T.shift_right(T.reinterpret(f"uint16x{size // 2}", raw), splat(T.uint16(4), size // 2))
        return [T.reinterpret(f"int8x{size}", T.bitwise_and(part, splat(T.uint8(15), size)))
                for part in (raw, T.reinterpret(f"uint8x{size}", high))]

    def _four(self, x: Expr) -> Expr:
        return T.reinterpret(f"int8x{4 * self.lanes}", splat(x, self.lanes))

    def _product(self, sums: Expr, w: Expr, x: Expr) -> Expr:
        """sums + the products of each lane."""
        raise NotImplementedError


class VnniTile(DotTile):
    """Unsigned weight and signed x: AVX-512 VNNI has 16 lanes, AVX-VNNI 8. int8 gets 128 by flipping its sign bit."""

    biased = True

    def _codes(self, raw: Expr) -> list[Expr]:
        flipped = [T.bitwise_xor(raw, splat(T.int8(-128), 4 * self.lanes))] if self.format == "int8" else None
        return flipped or super()._codes(raw)

    def _product(self, sums: Expr, w: Expr, x: Expr) -> Expr:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        return T.call_llvm_pure_intrin(f"int32x{self.lanes}", name, sums, w, x)


class ArmTile(DotTile):
    """ARM's SDOT, signed weight and x."""

    def _product(self, sums: Expr, w: Expr, x: Expr) -> Expr:
        return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, w, x)


class NeonTile(DotTile):
    """ARM without SDOT: products of two rows in 16 bits, their pairs in 32 bits, neighbours of those."""

    def _product(self, sums: Expr, w: Expr, x: Expr) -> Expr:
        pairs = []
        for half in (T.vectorlow, T.vectorhigh):
            wide_ = T.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.smull.v8i16", half("int8x8", w),
                                            half("int8x8", x))
            pairs.append(T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", wide_))
        return sums + T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp.v4i32", *pairs)


class Avx2Tile(IntegerTile):
    """AVX2: 32 products summed in pairs to 16 bits; lines of 64 bytes are two vectors of 8 rows."""

    def dot(self, at: Expr, xq: list[Expr], xz: list[Expr], sums: Array) -> None:
        (self._dot4 if self.format == "int4" else self._dot8)(at, xq, xz, sums)

    def _dot4(self, at: Expr, xq: list[Expr], xz: list[Expr], sums: Array) -> None:
        """Unsigned nibbles times signed bytes. 16 products of 15 * 127 fit 16 bits, a group has that many a lane."""
        halves = local("halves", "int16", len(xq) * TILE * 2)
        for r in range(len(xq)):
            halves[r * 32, 32] = splat(T.int16(0), 32)
        for b in range(self.lines):
            for v in range(2):
                raw = let("raw", self.a.w[at + b * LINE + v * 32, 32])
                for high in range(2):
                    nibble = let("nibble", _high(raw) if high else _low(raw))
                    for r, q in enumerate(xq):
                        lane = r * 32 + v * 16
                        product = _maddubs(nibble, _four(self.a.xq[q + b * 2 + high]))
                        halves[lane, 16] = halves[lane, 16] + product
        for r, z in enumerate(xz):
            zero = splat(let("z", z), 8)
            for v in range(2):
                sums[r * TILE + v * 8, 8] = _maddwd(halves[r * 32 + v * 16, 16], splat(T.int16(1), 16)) + zero

    def _dot8(self, at: Expr, xq: list[Expr], xz: list[Expr], sums: Array) -> None:
        """|w| times x with the sign of w; a pair of products fits 16 bits because codes stay within +-127."""
        for r in range(len(xq)):
            sums[r * TILE, TILE] = i32(0, TILE)
        for b in range(self.lines):
            for v in range(2):
                w = let("w", self.a.w[at + b * LINE + v * 32, 32])
                size = let("size", _sign(w, w))
                for r, q in enumerate(xq):
                    lane = r * TILE + v * 8
                    pair = _maddubs(size, _sign(_four(self.a.xq[q + b]), w))
                    sums[lane, 8] = sums[lane, 8] + _maddwd(pair, splat(T.int16(1), 16))


def _low(raw: Expr) -> Expr:
    return T.reinterpret("int8x32", T.bitwise_and(raw, splat(T.uint8(15), 32)))


def _high(raw: Expr) -> Expr:
    shifted = T.shift_right(T.reinterpret("uint16x16", raw), splat(T.uint16(4), 16))
    return _low(T.reinterpret("uint8x32", shifted))


def _four(x: Expr) -> Expr:
    """Four int8 activations, an int32, in every lane."""
    return T.reinterpret("int8x32", splat(x, 8))


def _maddubs(u: Expr, s: Expr) -> Expr:
    """Unsigned times signed bytes, neighbours summed (saturating) to int16x16."""
    return T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", u, s)


def _maddwd(a: Expr, b: Expr) -> Expr:
    """int16 times int16, neighbours summed to int32x8."""
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", a, b)


def _sign(x: Expr, w: Expr) -> Expr:
    """x with the sign of w, zero where w is zero."""
    return T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", x, w)
