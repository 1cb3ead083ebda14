"""Kernels of plans of one token: matrix-vector products and experts, one warp a row.

A tile is [32, R, C]: lanes along the row of weights, R = WARPS rows, C = 16 bytes of a row. Triton then gives every lane
consecutive bytes, every warp a row of its own, and a product ends in shuffles alone: no barrier, no shared memory.
Weights are asked for before the kernel in front has ended; `ahead` asks for those of a later kernel to be brought into L2.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin, fetch_ahead, rounded, silu, to_f32, true_rows


@triton.jit
def row_tile(w, row, rows, c0, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """w[row, c0 : c0 + 32 C] as stored, [32, R, C]; rows beyond `rows` and columns beyond K are zeros."""
    k = c0 + tl.arange(0, 32)[:, None, None] * C + tl.arange(0, C)[None, None, :]
    at = w + row * K + k
    if FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=(row < rows) & (k < K), other=0.0)


@triton.jit
def vector_tile(x, c0, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FRESH: tl.constexpr):
    """x[c0 : c0 + 32 C] in f32, [32, R, C], the same for every warp. FRESH: read past the first cache."""
    same = tl.arange(0, R)[None, :, None] * 0
    k = c0 + tl.arange(0, 32)[:, None, None] * C + tl.arange(0, C)[None, None, :] + same
    if K % (32 * C) == 0:
        if FRESH:
            return tl.load(x + k, cache_modifier=".cg").to(tl.float32)
        else:
            return tl.load(x + k).to(tl.float32)
    else:
        return tl.load(x + k, mask=k < K, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def block_scale(s, row, rows, c0, K: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """The scales [32, R, 1] of a tile: C divides 128, so a lane's columns share one."""
    k = c0 + tl.arange(0, 32)[:, None, None] * C
    at = s + (row // 128) * ((K + 127) // 128) + k // 128
    if FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=(row < rows) & (k < K), other=0.0)


@triton.jit
def head_scale(squares, c0, K: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr,
               EPS: tl.constexpr):
    """1 / rms of the head that a lane's columns belong to, [32, 1, 1]; squares [heads, SPLITS] are partial sums."""
    k = c0 + tl.arange(0, 32)[:, None, None] * C
    i = tl.arange(0, SPLITS)[None, None, :]
    parts = tl.load(squares + (k // HEAD) * SPLITS + i, mask=(k < K) & (i >= 0), other=0.0)
    return tl.rsqrt(tl.sum(parts, 2, keep_dims=True) / HEAD + EPS)


@triton.jit
def gemv_rows(row0, x, norm_w, squares, w, s, r, y, counts, ahead, ROWS: tl.constexpr, TIMES: tl.constexpr,
              N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RW: tl.constexpr, C: tl.constexpr,
              HOLD: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, HEAD: tl.constexpr,
              SPLITS: tl.constexpr, EPS: tl.constexpr, SCALED: tl.constexpr, AHEAD: tl.constexpr, FROM: tl.constexpr,
              LANES: tl.constexpr, PDL: tl.constexpr):
    """R * RW rows of one product. The first HOLD column tiles are on their way before the wait. NORM: x goes through an
    RMS norm, its weight on the way in, its scale at the end. HEAD > 0: x is divided by the rms of its head."""
    whole: tl.constexpr = K % (32 * C) == 0 and N % (R * RW) == 0
    r0 = row0 + tl.arange(0, R)[None, :, None]
    held = ()
    for i in tl.static_range(HOLD):
        for g in tl.static_range(RW):
            held = held + (row_tile(w, r0 + g * R, N, i * (32 * C), K, R, C, whole),)
    fetch_ahead(ahead, AHEAD, FROM, LANES, PDL)
    begin(PDL)
    if true_rows(counts, ROWS, TIMES) > 0:
        sums = ()
        for g in tl.static_range(RW):
            sums = sums + (tl.zeros((32, R, 1), tl.float32),)
        total = tl.zeros((32, R, 1), tl.float32)
        for i in tl.static_range((K + 32 * C - 1) // (32 * C)):
            c0 = i * (32 * C)
            v = vector_tile(x, c0, K, R, C, False)
            if NORM:
                total += tl.sum(v * v, 2, keep_dims=True)
                v *= vector_tile(norm_w, c0, K, R, C, False)
            fresh = ()
            for g in tl.static_range(RW):
                n = r0 + g * R
                tile = held[i * RW + g] if i < HOLD else row_tile(w, n, N, c0, K, R, C, whole)
                part = tl.sum(to_f32(tile) * v, 2, keep_dims=True)
                if SCALED:
                    part *= block_scale(s, n, N, c0, K, C, whole)
                if HEAD > 0:
                    part *= head_scale(squares, c0, K, C, HEAD, SPLITS, EPS)
                fresh = fresh + (sums[g] + part,)
            sums = fresh
        for g in tl.static_range(RW):
            n = r0 + g * R
            out = tl.sum(sums[g], 0, keep_dims=True)
            if NORM:
                out *= tl.rsqrt(tl.sum(total, 0, keep_dims=True) / K + EPS)
            if BIAS:
                out += tl.load(r + n, mask=n < N, other=0.0).to(tl.float32)
            if ADD:
                out = rounded(out) + tl.load(r + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(y + n, out.to(tl.bfloat16), mask=n < N)


@triton.jit
def gemv(x, norm_w, squares, w, s, r, y, counts, ahead, ROWS: tl.constexpr, TIMES: tl.constexpr, N: tl.constexpr,
         K: tl.constexpr, R: tl.constexpr, RW: tl.constexpr, C: tl.constexpr, HOLD: tl.constexpr, ADD: tl.constexpr,
         BIAS: tl.constexpr, NORM: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr, EPS: tl.constexpr,
         SCALED: tl.constexpr, AHEAD: tl.constexpr, FROM: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr):
    """y = w x (+ r) of one token, x as it is, normed, or divided by the rms of its heads. Grid (N / (R RW))."""
    gemv_rows(tl.program_id(0) * (R * RW), x, norm_w, squares, w, s, r, y, counts, ahead, ROWS, TIMES, N, K, R, RW, C,
              HOLD, ADD, BIAS, NORM, HEAD, SPLITS, EPS, SCALED, AHEAD, FROM, LANES, PDL)


@triton.jit
def gemv_pair(x, norm_w, w, s, w2, y, y2, counts, ahead, N: tl.constexpr, N2: tl.constexpr, K: tl.constexpr,
              R: tl.constexpr, RW: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, HOLD: tl.constexpr,
              HOLD2: tl.constexpr, EPS: tl.constexpr, SCALED: tl.constexpr, AHEAD: tl.constexpr, FROM: tl.constexpr,
              LANES: tl.constexpr, PDL: tl.constexpr):
    """Two products of one normed token, the second with bf16 weights. Grid (N2 / R + N / (R RW))."""
    p = tl.program_id(0)
    small: tl.constexpr = (N2 + R - 1) // R
    if p < small:
        gemv_rows(p * R, x, norm_w, None, w2, None, None, y2, counts, ahead, 0, 1, N2, K, R, 1, C2, HOLD2, False, False,
                  True, 0, 1, EPS, False, AHEAD, FROM, LANES, PDL)
    else:
        gemv_rows((p - small) * (R * RW), x, norm_w, None, w, s, None, y, counts, ahead, 0, 1, N, K, R, RW, C, HOLD,
                  False, False, True, 0, 1, EPS, SCALED, AHEAD, FROM, LANES, PDL)


@triton.jit
def router_keys(logits, EXPERTS: tl.constexpr, BL: tl.constexpr, R: tl.constexpr):
    """Sortable i32 of every expert, [32, R, BL], the same for every warp: a bf16 logit above its index, so that one max
    selects and ties go to the lower expert. NaN sorts first and still names an expert."""
    e = tl.arange(0, 32)[:, None, None] * BL + tl.arange(0, BL)[None, None, :] + tl.arange(0, R)[None, :, None] * 0
    raw = tl.load(logits + e, mask=e < EXPERTS, other=0.0, cache_modifier=".cg")
    bits = raw.to(tl.int16, bitcast=True).to(tl.int32)
    order = tl.where(bits < 0, bits ^ 0x7FFF, bits)  # two's complement order of the floats
    return tl.where(e < EXPERTS, order * 65536 + (65535 - e), -2147483647)


@triton.jit
def best_key(keys):
    """The largest key of every warp, [1, R, 1]."""
    return tl.max(tl.max(keys, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def key_expert(key):
    return 65535 - (key & 0xFFFF)


@triton.jit
def key_logit(key):
    """The logit in a key, f32."""
    order = key >> 16
    bits = tl.where(order < 0, order ^ 0x7FFF, order)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def normed_tiles(x, norm_w, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr):
    """The RMS norm of x as a tuple of tiles [32, R, C], f32."""
    raw = ()
    total = tl.zeros((32, R, 1), tl.float32)
    for i in tl.static_range((K + 32 * C - 1) // (32 * C)):
        v = vector_tile(x, i * (32 * C), K, R, C, True)
        total += tl.sum(v * v, 2, keep_dims=True)
        raw = raw + (v * vector_tile(norm_w, i * (32 * C), K, R, C, False),)
    scale = tl.rsqrt(tl.sum(total, 0, keep_dims=True) / K + EPS)
    tiles = ()
    for i in tl.static_range((K + 32 * C - 1) // (32 * C)):
        tiles = tiles + (raw[i] * scale,)
    return tiles


@triton.jit
def expert_up(xs, we, se, f, F: tl.constexpr, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr, SCALED: tl.constexpr):
    """silu(gate x) * up x of rows f [1, R, 1] of one expert (its weights [2F, H] at we, gate above up), [1, R, 1]."""
    whole: tl.constexpr = H % (32 * C) == 0 and F % R == 0
    a = tl.zeros((32, R, 1), tl.float32)
    b = tl.zeros((32, R, 1), tl.float32)
    gates, ups = (), ()
    up = tl.where(f < F, f + F, 2 * F)
    gate = tl.where(f < F, f, 2 * F)
    for i in tl.static_range((H + 32 * C - 1) // (32 * C)):
        gates = gates + (row_tile(we, gate, 2 * F, i * (32 * C), H, R, C, whole),)
        ups = ups + (row_tile(we, up, 2 * F, i * (32 * C), H, R, C, whole),)
    for i in tl.static_range((H + 32 * C - 1) // (32 * C)):
        g = tl.sum(to_f32(gates[i]) * xs[i], 2, keep_dims=True)
        u = tl.sum(to_f32(ups[i]) * xs[i], 2, keep_dims=True)
        if SCALED:
            g *= block_scale(se, gate, 2 * F, i * (32 * C), H, C, whole)
            u *= block_scale(se, up, 2 * F, i * (32 * C), H, C, whole)
        a += g
        b += u
    return silu(tl.sum(a, 0, keep_dims=True)) * tl.sum(b, 0, keep_dims=True)


@triton.jit
def route_up(x, norm_w, logits, w, s, h, counts, ahead, EXPERTS: tl.constexpr, BL: tl.constexpr, TOP: tl.constexpr,
             SHARED: tl.constexpr, GROUPS: tl.constexpr, H: tl.constexpr, F: tl.constexpr, R: tl.constexpr,
             C: tl.constexpr, EPS: tl.constexpr, SCALED: tl.constexpr, AHEAD: tl.constexpr, FROM: tl.constexpr,
             LANES: tl.constexpr, PDL: tl.constexpr):
    """Norm, top-k and h[slot] = silu(gate x) * up x for every GROUPS-th slot. Grid (F / R, GROUPS); w [E, 2F, H]. x and
    its norm are read before the wait: the router, the kernel in front, has read them too. Every warp selects for itself;
    the shared expert (slot TOP) needs no selection and comes first."""
    g = tl.program_id(1)
    f = tl.program_id(0) * R + tl.arange(0, R)[None, :, None]
    lane = tl.arange(0, 32)[:, None, None]
    blocks: tl.constexpr = ((2 * F + 127) // 128) * ((H + 127) // 128)
    xs = normed_tiles(x, norm_w, H, R, C, EPS)
    fetch_ahead(ahead, AHEAD, FROM, LANES, PDL)
    begin(PDL)
    if tl.load(counts) > 0:
        found = tl.zeros((32, R, 1), tl.float32)
        keys = router_keys(logits, EXPERTS, BL, R)
        for i in tl.static_range((TOP + SHARED + GROUPS - 1) // GROUPS):
            expert = tl.full((1, R, 1), EXPERTS, tl.int32)
            for j in tl.static_range(GROUPS):
                if i * GROUPS + j >= SHARED and i * GROUPS + j < TOP + SHARED:
                    best = best_key(keys)
                    keys = tl.where(keys == best, -2147483648, keys)
                    expert = tl.where(g == j, key_expert(best), expert)
            if i * GROUPS + g < TOP + SHARED:
                at = expert.to(tl.int64)
                out = expert_up(xs, w + at * (2 * F * H), s + at * blocks if SCALED else s, f, F, H, R, C, SCALED)
                found = tl.where(lane == i, out, found)
        position = lane * GROUPS + g  # in the order of work: the shared expert first
        slot = tl.where(position < SHARED, TOP, position - SHARED)
        tl.store(h + slot * F + f, found.to(tl.bfloat16), mask=(position < TOP + SHARED) & (f < F))


@triton.jit
def route_down(h, logits, w, s, r, y, counts, ahead, EXPERTS: tl.constexpr, BL: tl.constexpr, TOP: tl.constexpr,
               SHARED: tl.constexpr, NORMALIZE: tl.constexpr, H: tl.constexpr, F: tl.constexpr, R: tl.constexpr,
               RW: tl.constexpr, C: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, AHEAD: tl.constexpr,
               FROM: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr):
    """y = (r +) sum over slots of weight * down h[slot], in order. Grid (H / (R RW)); w [E, H, F]. The selection is made
    again, and all rows are asked for, before the kernel in front (route_up) has ended: the router ran before that one."""
    n0 = tl.program_id(0) * (R * RW) + tl.arange(0, R)[None, :, None]
    whole: tl.constexpr = F % (32 * C) == 0 and H % (R * RW) == 0
    steps: tl.constexpr = (F + 32 * C - 1) // (32 * C)
    blocks: tl.constexpr = ((H + 127) // 128) * ((F + 127) // 128)
    keys = router_keys(logits, EXPERTS, BL, R)
    top = key_logit(best_key(keys))
    total = tl.zeros((1, R, 1), tl.float32)
    if not NORMALIZE:
        total += tl.sum(tl.sum(tl.where(keys > -2147483647, tl.exp(key_logit(keys) - top), 0.0), 2, keep_dims=True), 0,
                        keep_dims=True)
    rows, scales, weights = (), (), ()
    for j in tl.static_range(TOP + SHARED):
        if j < TOP:
            best = best_key(keys)
            keys = tl.where(keys == best, -2147483648, keys)
            expert = key_expert(best).to(tl.int64)
            weight = tl.exp(key_logit(best) - top)
            if NORMALIZE:
                total += weight
        else:
            expert = tl.full((1, R, 1), EXPERTS, tl.int64)
            weight = tl.sigmoid(tl.load(logits + EXPERTS, cache_modifier=".cg").to(tl.float32)) + total * 0.0
        weights = weights + (weight,)
        for i in tl.static_range(steps):
            for g in tl.static_range(RW):
                n = n0 + g * R
                rows = rows + (row_tile(w + expert * (H * F), n, H, i * (32 * C), F, R, C, whole),)
                if SCALED:
                    scales = scales + (block_scale(s + expert * blocks, n, H, i * (32 * C), F, C, whole),)
    fetch_ahead(ahead, AHEAD, FROM, LANES, PDL)
    begin(PDL)
    if tl.load(counts) > 0:
        sums = ()
        for g in tl.static_range(RW):
            sums = sums + (tl.zeros((32, R, 1), tl.float32),)
        for j in tl.static_range(TOP + SHARED):
            weight = weights[j] / total if j < TOP else weights[j]
            for i in tl.static_range(steps):
                v = vector_tile(h + j * F, i * (32 * C), F, R, C, False) * weight
                fresh = ()
                for g in tl.static_range(RW):
                    part = tl.sum(to_f32(rows[(j * steps + i) * RW + g]) * v, 2, keep_dims=True)
                    if SCALED:
                        part *= scales[(j * steps + i) * RW + g]
                    fresh = fresh + (sums[g] + part,)
                sums = fresh
        for g in tl.static_range(RW):
            n = n0 + g * R
            out = tl.sum(sums[g], 0, keep_dims=True)
            if ADD:
                out = rounded(out) + tl.load(r + n, mask=n < H, other=0.0).to(tl.float32)
            tl.store(y + n, out.to(tl.bfloat16), mask=n < H)
