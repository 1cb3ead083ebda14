"""What ranks exchange over peer memory: each writes its part to all others and adds up what comes to it.

Every rank has an area that all others can write: epochs i32 [SLOTS], then data i64 [2, RANKS, SLOTS, D / 2], where each
number holds two bf16 and, above them, the epoch, which says that they have come (8 bytes are written at once). `peers`
i64: [0] this rank, [1 + r] the area of rank r as this one sees it. Two sets of data suffice: a rank begins exchange
n + 2 of a row only when it has the others' exchange n + 1, which they began when they had finished reading exchange n.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, narrowed, rounded, true_rows

PUSH = tl.constexpr(1)
PULL = tl.constexpr(2)


@triton.jit
def pulled(own, side, epoch, row, i, D: tl.constexpr, BD: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr):
    """The sums over ranks of even and odd columns of a row, f32 [BD/2] each, once all of this epoch have come."""
    inside = i < D // 2
    even, odd = tl.zeros((BD // 2,), tl.float32), tl.zeros((BD // 2,), tl.float32)
    for r in tl.static_range(RANKS):
        source = place(own, side + r, row, i, D, SLOTS)
        v = tl.load(source, mask=inside, other=0, volatile=True)
        while tl.max(tl.where(inside & ((v >> 32).to(tl.int32) != epoch), 1, 0), 0) > 0:
            v = tl.load(source, mask=inside, other=0, volatile=True)
        pair = v.to(tl.int32)
        even += (pair << 16).to(tl.float32, bitcast=True)
        odd += (pair & -65536).to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def all_reduce(x, y, peers, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
               SLOTS: tl.constexpr, RANKS: tl.constexpr, PHASES: tl.constexpr, PDL: tl.constexpr):
    """y[row] = the sum of x[row] of all ranks, in their order: the same bits on each. D even. Grid (rows)."""
    row = tl.program_id(0)
    i = tl.arange(0, BD // 2)
    inside = i < D // 2
    begin(PDL)
    if row < true_rows(counts, ROWS, TIMES):
        rank = tl.load(peers)
        own = tl.load(peers + 1 + rank)
        epochs = own.to(tl.pointer_type(tl.int32))
        epoch = tl.load(epochs + row) + 1
        side = (epoch & 1) * RANKS
        words = row * (D // 2) + i
        if PHASES != PULL:
            v = tl.load(x.to(tl.pointer_type(tl.int32)) + words, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
            v |= epoch.to(tl.int64) << 32
            for r in tl.static_range(RANKS):
                tl.store(place(tl.load(peers + 1 + r), side + rank, row, i, D, SLOTS), v, mask=inside)
        if PHASES != PUSH:
            even, odd = pulled(own, side, epoch, row, i, D, BD, SLOTS, RANKS)
            tl.store(epochs + row, epoch)
            tl.store(y.to(tl.pointer_type(tl.int32)) + words, bits(even) | (bits(odd) << 16), mask=inside)


@triton.jit
def all_reduce_norm(x, y, peers, w, n, q, qs, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, D: tl.constexpr,
                    BD: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr, RP: tl.constexpr,
                    PHASES: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, NARROW: tl.constexpr,
                    PDL: tl.constexpr):
    """all_reduce; with NORM n[row] = norm(y[row]) * w too, with NARROW n in e4m3 too (q, and scales qs of 128 columns
    each). What does not change (where the areas are, w) is read while the kernel before still runs. Grid (rows)."""
    row = tl.program_id(0)
    d, i, r = tl.arange(0, BD), tl.arange(0, BD // 2), tl.arange(0, RP)
    inside = i < D // 2
    rank = tl.load(peers)
    areas = tl.load(peers + 1 + r, mask=r < RANKS, other=0)
    own = tl.sum(tl.where(r == rank, areas, 0), 0)
    weight = tl.load(w + d, mask=d < D, other=0.0) if NORM else 0.0
    begin(PDL)
    if row < true_rows(counts, ROWS, TIMES):
        epochs = own.to(tl.pointer_type(tl.int32))
        epoch = tl.load(epochs + row) + 1
        side = (epoch & 1) * RANKS
        if PHASES != PULL:
            words = row * (D // 2) + i
            v = tl.load(x.to(tl.pointer_type(tl.int32)) + words, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
            v |= epoch.to(tl.int64) << 32
            for other in tl.static_range(RANKS):
                area = tl.sum(tl.where(r == other, areas, 0), 0)
                tl.store(place(area, side + rank, row, i, D, SLOTS), v, mask=inside)
        if PHASES != PUSH:
            even, odd = pulled(own, side, epoch, row, i, D, BD, SLOTS, RANKS)
            tl.store(epochs + row, epoch)
            total = tl.interleave(even, odd).to(tl.bfloat16)
            tl.store(y + row * D + d, total, mask=d < D)
            if NORM:
                kept = total.to(tl.float32)
                out = kept * tl.rsqrt(tl.sum(kept * kept, 0) / D + EPS) * weight
                tl.store(n + row * D + d, out.to(tl.bfloat16), mask=d < D)
                if NARROW:
                    codes, scale = narrowed(tl.reshape(rounded(out), (1, BD)), 1, BD, 128)
                    group = tl.arange(0, BD // 128)
                    tl.store(q + row * D + d, tl.reshape(codes, (BD,)), mask=d < D)
                    tl.store(qs + row * (D // 128) + group, tl.reshape(scale, (BD // 128,)), mask=group < D // 128)


@triton.jit
def bits(v):
    """f32 rounded to bf16, its bits in the lower half of an i32."""
    return v.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def place(area, part, row, i, D: tl.constexpr, SLOTS: tl.constexpr):
    """Where row `row` of set `part` lies in an area."""
    data = (area + 4 * SLOTS).to(tl.pointer_type(tl.int64))
    return tl.multiple_of(data + ((part * SLOTS + row) * (D // 2) + i), 16)


@triton.jit
def interleave(parts, y, counts, ROWS: tl.constexpr, TIMES: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
               RANKS: tl.constexpr, CAPACITY: tl.constexpr, PDL: tl.constexpr):
    """y[row] = the rows of all ranks side by side; parts [RANKS, CAPACITY, D]. Grid (rows, RANKS)."""
    row, rank = tl.program_id(0), tl.program_id(1)
    begin(PDL)
    if row < true_rows(counts, ROWS, TIMES):
        source = parts + (rank * CAPACITY + row).to(tl.int64) * D
        target = y + row.to(tl.int64) * (D * RANKS) + rank * D
        for at in range(0, D, BD):
            d = at + tl.arange(0, BD)
            tl.store(target + d, tl.load(source + d, mask=d < D), mask=d < D)
