"""The next token of each wanted row: adjust, shortlist, pick. What a request asks for is data: one graph serves all.

A row of `choice` is 16 numbers (runtime/cuda/sampling.py writes them): flags, slot, top-k, seed (2), index of the
token, 1 / temperature (0: greedy), top-p, min-p, repetition, frequency and presence penalty. Tokens are ordered by
logit, then by number; top-k, top-p and min-p each keep a head of that order, so all that is needed is where it ends.
A random number belongs to (seed, index): what else is in the batch changes nothing.
"""

import triton
import triton.language as tl

from qcn_compile.targets.triton.kernels.common import begin

CHOICE: tl.constexpr = tl.constexpr(16)
ON: tl.constexpr = tl.constexpr(1)
PENALISED: tl.constexpr = tl.constexpr(2)
BIASED: tl.constexpr = tl.constexpr(4)
BOUND: tl.constexpr = tl.constexpr(8)
COUNT: tl.constexpr = tl.constexpr(0x3FFFFFFF)  # of a history entry; the bit above it says: in the prompt
GROUP: tl.constexpr = tl.constexpr(16)  # neighbours that stay in one block


@triton.jit
def real(choice, place: tl.constexpr):
    return tl.load(choice + place).to(tl.float32, bitcast=True)


@triton.jit
def adjusted(logits, d, inside, choice, history, bias, allowed, V: tl.constexpr):
    """Logits d as f32 after bias, penalties and grammar; -inf where not inside; a NaN becomes +inf."""
    flags, slot = tl.load(choice), tl.load(choice + 1).to(tl.int64)
    v = tl.load(logits + d, mask=inside, other=float("-inf")).to(tl.float32)
    if flags & BIASED:
        v += tl.load(bias + slot * V + d, mask=inside, other=0.0)
    if flags & PENALISED:
        past = tl.load(history + slot * V + d, mask=inside, other=0)
        count = (past & COUNT).to(tl.float32)
        factor = real(choice, 9)
        v = tl.where(past != 0, v * tl.where(v > 0, 1.0 / factor, factor), v)
        v -= real(choice, 10) * count + real(choice, 11) * tl.where(count > 0, 1.0, 0.0)
    if flags & BOUND:
        words: tl.constexpr = (V + 31) // 32
        word = tl.load(allowed + slot * words + d // 32, mask=inside, other=0)
        v = tl.where(((word >> (d % 32)) & 1) != 0, v, float("-inf"))
    return tl.where(v == v, v, float("inf"))


@triton.jit
def members(b, BV: tl.constexpr, BLOCKS: tl.constexpr):
    """The BV tokens of a block: groups of 16 dealt out in turn, so that likely tokens, often neighbours, are spread."""
    i = tl.arange(0, BV)
    return ((i // GROUP) * BLOCKS + b) * GROUP + i % GROUP


@triton.jit
def asked(choice, r, counts):
    """Whether there is a row r, and its token is chosen here."""
    alive = r < tl.load(counts + 2)
    return alive & ((tl.load(choice, mask=alive, other=0) & ON) != 0)


@triton.jit
def filtered(choice):
    """Whether top-k, top-p or min-p leave anything out."""
    return (tl.load(choice + 2) > 0) | (real(choice, 7) < 1.0) | (real(choice, 8) > 0.0)


@triton.jit
def before(value, number, other_value, other_number):
    """Whether a token comes before another one."""
    return (value > other_value) | ((value == other_value) & (number < other_number))


@triton.jit
def sample_blocks(logits, choice, history, bias, allowed, top, arg, mass, counts, V: tl.constexpr, SX: tl.constexpr,
                  BV: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr):
    """Largest logit, its number, and the mass relative to it of BV tokens. Grid (BLOCKS, R)."""
    b, r = tl.program_id(0), tl.program_id(1)
    d = members(b, BV, BLOCKS)
    begin(PDL)
    mine = choice + r * CHOICE
    if asked(mine, r, counts):
        v = adjusted(logits + r.to(tl.int64) * SX, d, d < V, mine, history, bias, allowed, V)
        peak = tl.max(v, 0)
        shift = tl.where(peak > float("-inf"), peak, 0.0)
        tl.store(top + r * BLOCKS + b, peak)
        tl.store(arg + r * BLOCKS + b, tl.min(tl.where(v == peak, d, V - 1), 0))
        tl.store(mass + r * BLOCKS + b, tl.sum(tl.exp((v - shift) * real(mine, 6)), 0))


@triton.jit
def sample_shortlist(logits, choice, history, bias, allowed, top, value, number, found, counts, V: tl.constexpr,
                     SX: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr, BB: tl.constexpr, SHORT: tl.constexpr,
                     KEEP: tl.constexpr, PDL: tl.constexpr):
    """The tokens of a block that reach the k-th largest of the blocks' maxima, which at least k tokens do: a list that
    holds the first k, and few more. At most KEEP are stored, found says how many there are. Grid (BLOCKS, R)."""
    b, r = tl.program_id(0), tl.program_id(1)
    d, i = members(b, BV, BLOCKS), tl.arange(0, BB)
    begin(PDL)
    mine = choice + r * CHOICE
    if asked(mine, r, counts) & (real(mine, 6) > 0.0) & filtered(mine):
        k = tl.load(mine + 2)
        k = tl.where((k > 0) & (k < SHORT), k, SHORT)
        peaks = tl.load(top + r * BLOCKS + i, mask=i < BLOCKS, other=float("-inf"))
        rank = tl.zeros((BB,), tl.int32)
        for j0 in range(0, BB, 32):
            j = j0 + tl.arange(0, 32)
            other = tl.load(top + r * BLOCKS + j, mask=j < BLOCKS, other=float("-inf"))
            rank += tl.sum(before(other[:, None], j[:, None], peaks[None, :], i[None, :]).to(tl.int32), 0)
        least = tl.max(tl.where(rank == k - 1, peaks, float("-inf")), 0)
        total = 0
        if tl.load(top + r * BLOCKS + b) >= least:
            v = adjusted(logits + r.to(tl.int64) * SX, d, d < V, mine, history, bias, allowed, V)
            chosen = (v >= least) & (d < V)
            at = tl.cumsum(chosen.to(tl.int32), 0) - 1
            place = (r * BLOCKS + b) * KEEP + at
            tl.store(value + place, v, mask=chosen & (at < KEEP))
            tl.store(number + place, d, mask=chosen & (at < KEEP))
            total = tl.sum(chosen.to(tl.int32), 0)
        tl.store(found + r * BLOCKS + b, total)


@triton.jit
def order_key(v):
    """f32 as whole numbers of the same order."""
    bits = v.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def reaching(logits, choice, history, bias, allowed, peak, least, V: tl.constexpr, CHUNK: tl.constexpr):
    """(how many, their mass) of the tokens whose key is at least `least`."""
    count, mass = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.float32)
    for start in range(0, V, CHUNK):
        d = start + tl.arange(0, CHUNK)
        v = adjusted(logits, d, d < V, choice, history, bias, allowed, V)
        chosen = (order_key(v) >= least) & (d < V)
        count += chosen.to(tl.int32)
        mass += tl.where(chosen, tl.exp((v - peak) * real(choice, 6)), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def pick_any(logits, choice, history, bias, allowed, peak, least, target, V: tl.constexpr, CHUNK: tl.constexpr):
    """The token at `target` of the mass of those that reach `least`, in order of number."""
    token, reached = -1, 0.0
    last = 0
    for start in range(0, V, CHUNK):
        d = start + tl.arange(0, CHUNK)
        v = adjusted(logits, d, d < V, choice, history, bias, allowed, V)
        weight = tl.where((order_key(v) >= least) & (d < V), tl.exp((v - peak) * real(choice, 6)), 0.0)
        upto = reached + tl.cumsum(weight, 0)
        here = tl.min(tl.where((upto > target) & (weight > 0), d, V), 0)
        token = tl.where((token < 0) & (here < V), here, token)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, d, 0), 0))
        reached += tl.sum(weight, 0)
    return tl.where(token < 0, last, token)


@triton.jit
def pick_slowly(logits, choice, history, bias, allowed, peak, total, u, V: tl.constexpr, CHUNK: tl.constexpr):
    """For a head of the order that no shortlist holds: bisection over the keys. Equal logits stay in together.

    Rounds 0 to 31 find the largest key that k tokens reach, 32 their mass; 33 to 64 the smallest key above which less
    than p of that mass is; 65 the mass of what is left."""
    k, p, floor = tl.load(choice + 2), real(choice, 7), real(choice, 8)
    low, high = tl.full((), -2147483648, tl.int64), tl.full((), 2147483647, tl.int64)
    wanted = tl.where(p < 1.0, p * total, float("inf"))
    left = total
    for n in range(tl.where(k > 0, 0, 33), 66):
        middle = tl.where(n < 32, (low + high + 1) >> 1, tl.where((n > 32) & (n < 65), ((low + high) >> 1) + 1, low))
        count, left = reaching(logits, choice, history, bias, allowed, peak, middle, V, CHUNK)
        if n < 32:
            enough = count >= k
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
        elif n == 32:
            high = tl.full((), 2147483647, tl.int64)
            wanted = tl.where(p < 1.0, p * left, float("inf"))
        elif n < 65:
            enough = left < wanted
            low, high = tl.where(enough, low, middle), tl.where(enough, middle - 1, high)
            if (n == 64) & (floor > 0.0):
                low = tl.maximum(low, order_key(peak + tl.log(floor) / real(choice, 6)).to(tl.int64))
    return pick_any(logits, choice, history, bias, allowed, peak, low, u * left, V, CHUNK)


@triton.jit
def pick_short(v, d, listed, value, number, ends, peak, total, u, r, choice, BLOCKS: tl.constexpr,
               KEEP: tl.constexpr, CAP: tl.constexpr, SHORT: tl.constexpr):
    """(token, whether the list was enough) from the shortlist v, d [CAP]."""
    k, p, scale = tl.load(choice + 2), real(choice, 7), real(choice, 6)
    weight = tl.where(listed, tl.exp((v - peak) * scale), 0.0)
    rank, ahead = tl.zeros((CAP,), tl.int32), tl.zeros((CAP,), tl.float32)
    for j0 in range(0, CAP, 32):
        other, name, there = entries(j0 + tl.arange(0, 32), r, value, number, ends, BLOCKS, KEEP)
        first = before(other[:, None], name[:, None], v[None, :], d[None, :]) & there[:, None]
        mass = tl.where(there, tl.exp((other - peak) * scale), 0.0)
        rank += tl.sum(first.to(tl.int32), 0)
        ahead += tl.sum(tl.where(first, mass[:, None], 0.0), 0)
    limited = (k > 0) & (k <= SHORT)
    kept = listed & (rank < tl.where(k > 0, k, CAP))
    whole = tl.where(limited, tl.sum(tl.where(kept, weight, 0.0), 0), total)
    held = tl.sum(weight, 0)
    lightest = tl.min(tl.where(listed, weight, float("inf")), 0)
    enough = limited | ((k <= 0) & ((held >= p * whole) & (p < 1.0) | (lightest < real(choice, 8))))
    kept = kept & (ahead < tl.where(p < 1.0, p * whole, float("inf"))) & (weight >= real(choice, 8))
    target = u * tl.sum(tl.where(kept, weight, 0.0), 0)
    place = tl.max(tl.where(kept & (ahead <= target), rank, 0), 0)
    return tl.max(tl.where(listed & (rank == place), d, -1), 0), enough


@triton.jit
def entries(i, r, value, number, ends, BLOCKS: tl.constexpr, KEEP: tl.constexpr):
    """(value, token, whether there is one) of entries i of the list; block b holds those from ends[b-1] to ends[b]."""
    passed = ends[None, :] <= i[:, None]
    block = tl.sum(passed.to(tl.int32), 1)
    start = tl.max(tl.where(passed, ends[None, :], 0), 1)
    there = (block < BLOCKS) & (i - start < KEEP)
    place = (r * BLOCKS + block) * KEEP + i - start
    return tl.load(value + place, mask=there, other=float("-inf")), tl.load(number + place, mask=there, other=0), there


@triton.jit
def pick_block(logits, choice, history, bias, allowed, masses, peak, total, u, V: tl.constexpr, BV: tl.constexpr,
               BLOCKS: tl.constexpr, BB: tl.constexpr):
    """A token of the whole vocabulary: first its block by the blocks' masses [BB], then within it."""
    i = tl.arange(0, BB)
    upto = tl.cumsum(masses, 0)
    target = u * total
    b = tl.min(tl.where((upto > target) & (masses > 0), i, BB), 0)
    b = tl.where(b == BB, tl.max(tl.where(masses > 0, i, 0), 0), b)
    rest = target - tl.sum(tl.where(i < b, masses, 0.0), 0)
    d = members(b, BV, BLOCKS)
    v = adjusted(logits, d, d < V, choice, history, bias, allowed, V)
    weight = tl.where(d < V, tl.exp((v - peak) * real(choice, 6)), 0.0)
    within = tl.cumsum(weight, 0)
    token = tl.min(tl.where((within > rest) & (weight > 0), d, V), 0)
    return tl.where(token == V, tl.max(tl.where(weight > 0, d, 0), 0), token)


@triton.jit
def sample_pick(logits, choice, history, bias, allowed, top, arg, mass, value, number, found, chosen, last, counts,
                V: tl.constexpr, SX: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr, BB: tl.constexpr,
                KEEP: tl.constexpr, CAP: tl.constexpr, SHORT: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """chosen[r] = the token, -1 when the logits are no numbers; the slot's last token and history follow. Grid (R)."""
    r = tl.program_id(0)
    i = tl.arange(0, BB)
    begin(PDL)
    mine = choice + r * CHOICE
    if asked(mine, r, counts):
        x = logits + r.to(tl.int64) * SX
        slot = tl.load(mine + 1).to(tl.int64)
        peaks = tl.load(top + r * BLOCKS + i, mask=i < BLOCKS, other=float("-inf"))
        peak = tl.max(peaks, 0)
        best = tl.load(arg + r * BLOCKS + i, mask=i < BLOCKS, other=V)
        token = tl.min(tl.where(peaks == peak, best, V), 0)
        sound = (peak > float("-inf")) & (peak < float("inf"))
        scale = real(mine, 6)
        if sound & (scale > 0.0):
            seed = (tl.load(mine + 3).to(tl.int64) & 0xFFFFFFFF) | (tl.load(mine + 4).to(tl.int64) << 32)
            u = tl.rand(seed, tl.load(mine + 5))
            masses = tl.load(mass + r * BLOCKS + i, mask=i < BLOCKS, other=0.0)
            masses = tl.where(peaks > float("-inf"), masses * tl.exp((peaks - peak) * scale), 0.0)
            total = tl.sum(masses, 0)
            if filtered(mine):
                sizes = tl.load(found + r * BLOCKS + i, mask=i < BLOCKS, other=0)
                ends = tl.cumsum(sizes, 0)
                listed = tl.sum(sizes, 0)
                enough = (tl.max(sizes, 0) <= KEEP) & (listed <= CAP)
                if enough:
                    v, d, there = entries(tl.arange(0, CAP), r, value, number, ends, BLOCKS, KEEP)
                    token, enough = pick_short(v, d, there, value, number, ends, peak, total, u, r, mine, BLOCKS,
                                               KEEP, CAP, SHORT)
                if enough == 0:
                    token = pick_slowly(x, mine, history, bias, allowed, peak, total, u, V, CHUNK)
            else:
                token = pick_block(x, mine, history, bias, allowed, masses, peak, total, u, V, BV, BLOCKS, BB)
        token = tl.where(sound, token, -1)
        tl.store(chosen + r, token)
        tl.store(last + slot, tl.maximum(token, 0))
        if ((tl.load(mine) & PENALISED) != 0) & (token >= 0):
            seen = history + slot * V + token
            tl.store(seen, tl.load(seen) + 1)
