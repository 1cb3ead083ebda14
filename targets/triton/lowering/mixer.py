"""Lowering of attention and DeltaNet: the ops that own caches."""

from __future__ import annotations

from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.triton.choices import varied
from qcn_compile.targets.triton.lowering.delta_chunk import chunked
from qcn_compile.targets.triton.lowering.site import (
    BATCH,
    COUNTS,
    MOVES,
    SPANS,
    Site,
    call,
    cdiv,
    inner,
    power,
    result,
    scratch,
    state,
)

SPLITS, FEW = 32, 8  # stretches of the keys that decode attention looks at in parallel: of few tokens, of many
KEYS = 64
STEPS = 8  # tokens of a step whose value heads need no order among them; with more, one program has all of a key head
ROPED = 16  # tokens of a program that turns and appends
ROWS = 128  # tokens times heads of a KV head that a program of prefill attention works on


def rope_table(site: Site) -> list[Call]:
    half = int(site.operand(1).type.shape[0])  # type: ignore[arg-type]
    return [call("rope_table", [Ref("operand", index=0), site.frequencies(1), result(0), result(1), COUNTS],
                 (site.capacity(site.operand(0).type.shape),), HALF=half, BH=power(half),
                 SCALING=site.real("scaling"), FACTOR=int(site.operand(1).encoding is not None), WARPS=1)]


def _heads(site: Site, index: int) -> tuple[int, int]:
    type_ = site.activation(index)
    if type_.rank != 3:
        raise site.fail(f"operand {index} is {type_}", "give it as [T, heads, D]")
    return int(type_.shape[1]), int(type_.shape[2])  # type: ignore[arg-type]


def rope_append(site: Site) -> list[Call]:
    (heads, dim), (kv_heads, _) = _heads(site, 0), _heads(site, 1)
    site.stated("state")
    norms = [site.ref(i) for i in (3, 4) if site.has(i)]
    args = [*(site.ref(i) for i in range(3)), *norms, site.ref(5), site.ref(6), result(), state("state", "k"),
            state("state", "v"), *BATCH]
    tokens, programs = site.capacity(site.operand(0).type.shape), heads + 2 * kv_heads
    shape: dict[str, Param] = {
        "HQ": heads, "HKV": kv_heads, "D": dim, "BD": power(dim), "HALF": inner(site.operand(5).type.shape),
        "PAGE": site.page, "SQ": site.stride(0), "SK": site.stride(1), "SV": site.stride(2), "EPS": site.real("eps"),
        "Q_NORM": site.has(3), "K_NORM": site.has(4), "KV": site.cached}
    if site.bucket.sequences < site.bucket.tokens:
        return [call("rope_append_rows", args, (cdiv(tokens, ROPED), programs), BT=ROPED, WARPS=4, **shape)]
    return [call("rope_append", args, (tokens, programs), WARPS=1, **shape)]


def _appended_heads(site: Site) -> int:
    """Key heads of the cache: those of the rope_append that filled it and made the query."""
    value = site.op.operands[0]
    while value is not None and value.op is not None and value.op.name == "reshape":
        value = value.op.operands[0]
    maker = value.op if value is not None else None
    if maker is None or maker.name != "rope_append" or maker.operands[1] is None:
        raise site.fail("its query does not come from rope_append", "keep the pass fuse-attention in the pipeline")
    return int(maker.operands[1].tensor.shape[1])  # type: ignore[arg-type]


def paged_attention(site: Site) -> list[Call]:
    """Split keys and a combining launch when decoding, one flash launch in prefill."""
    heads, dim = _heads(site, 0)
    site.stated("state")
    kv_heads, tokens = _appended_heads(site), site.capacity(site.operand(0).type.shape)
    if heads % kv_heads:
        raise site.fail(f"{heads} query heads over {kv_heads} kv heads", "the first must be a multiple of the second")
    gate = [site.ref(1)] if site.has(1) else []
    wide = power(dim, 16)
    shared: dict[str, Param] = {"HQ": heads, "D": dim, "BD": wide}
    gated: dict[str, Param] = {"SG": site.stride(1) if gate else 0, "GATE": bool(gate)}
    caches: dict[str, Param] = {"HKV": kv_heads, "PAGE": site.page, "SQ": site.stride(0), "SCALE": site.real("scale"),
                                "KV": site.cached}
    pages = [state("state", "k"), state("state", "v")]
    group = power(heads // kv_heads)
    if site.bucket.sequences < site.bucket.tokens:  # prompts share their keys among many tokens
        block = max(1, ROWS // group)
        return [call("attention_prefill", [site.ref(0), *gate, result(), *pages, *BATCH],
                     (cdiv(tokens, block), kv_heads), BT=block, BG=group, BS=KEYS, PIPE=2, WARPS=8, **shared, **gated,
                     **caches)]
    splits = SPLITS if site.decode else FEW
    part = scratch("part", tokens * heads * splits * dim, "f32")
    score = scratch("score", tokens * heads * splits, "f32")
    return [
        call("attention_split", [site.ref(0), part, score, *pages, *BATCH], (tokens, kv_heads, splits),
             BG=max(16, group), BS=KEYS if dim <= 128 else KEYS // 2, SPLITS=splits, WARPS=8, STAGES=2, **shared,
             **caches),
        call("attention_combine", [part, score, *gate, result(), COUNTS], (tokens, heads), SPLITS=splits, WARPS=8,
             **shared, **gated)]


def delta_net(site: Site) -> list[Call]:
    """One launch when decoding; convolution, chunks, scan and gated norm in prefill."""
    site.stated("conv")
    site.stated("delta")
    sizes: dict[str, Param] = {"HK": site.integer("key_heads"), "HV": site.integer("value_heads"),
                               "DK": site.integer("key_dim"), "DV": site.integer("value_dim")}
    hv, dk, dv = int(sizes["HV"]), int(sizes["DK"]), int(sizes["DV"])
    if power(dk) != dk or power(dv) != dv:
        raise site.fail(f"head sizes {dk} and {dv}", "the GPU kernels need powers of two")
    taps = int(site.operand(4).type.shape[1])  # type: ignore[arg-type]
    weights = Ref("blob", index=4, layout="channels", part="w")
    conv: dict[str, Param] = {"TAPS": taps, "RING": site.ring, "SX": site.stride(0)}
    gates: dict[str, Param] = {"SB": site.stride(2), "SA": site.stride(3)}
    if site.bucket.sequences == site.bucket.tokens:
        args = [*(site.ref(i) for i in range(4)), weights, *(site.ref(i) for i in (5, 6, 7)), state("conv"),
                state("delta"), result(), *MOVES]
        if site.bucket.tokens == 1:
            return [varied(site.cuts, "delta", lambda cut: call(
                "delta_one", [*args[:-5], *SPANS[1:-1]], (hv,), **sizes, TAPS=taps, RING=site.ring,
                EPS=site.real("eps"), ST=site.held, **cut))]
        gates |= {"SZ": site.stride(1), "EPS": site.real("eps"), "ST": site.held}
        if site.bucket.tokens <= STEPS:
            return [call("delta_step", args, (hv, site.bucket.sequences), **sizes, **conv, **gates, WARPS=4)]
        return [call("delta_batch", args, (int(sizes["HK"]), site.bucket.sequences), **sizes, **conv, **gates, WARPS=4)]
    return chunked(site, sizes, conv, gates, weights)
