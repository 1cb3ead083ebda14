"""Lowering of attention and DeltaNet: the ops that own caches."""

from __future__ import annotations

from qcn_compile.targets.base import Call, Ref
from qcn_compile.targets.tvm.lowering.site import BATCH, COUNTS, SPANS, Site, call, inner, result, scratch, state
from qcn_compile.targets.tvm.sizes import PARTS


def rope_table(site: Site) -> list[Call]:
    positions = site.operand(0).type
    rows = site.rows(positions.shape)
    rows.pop("times")
    return [call("rope_table", [Ref("operand", index=0), site.frequencies(1), result(0), result(1), COUNTS], **rows,
                 width=int(site.operand(1).type.shape[0]), scaling=site.real("scaling"),  # type: ignore[arg-type]
                 threads=not site.decode, factor=site.operand(1).encoding is not None)]


def _heads(site: Site, index: int) -> tuple[int, int]:
    type_ = site.float_type(index)
    if type_.rank != 3:
        raise site.fail(f"operand {index} is {type_}", "give it as [T, heads, D]")
    return int(type_.shape[1]), int(type_.shape[2])  # type: ignore[arg-type]


def rope_append(site: Site) -> list[Call]:
    (heads, dim), (kv_heads, _) = _heads(site, 0), _heads(site, 1)
    site.stated("state")
    half = inner(site.float_type(5).shape)
    norms = [site.ref(i) for i in (3, 4) if site.has(i)]
    refs = [*(site.ref(i) for i in range(3)), *norms, site.ref(5), site.ref(6), result(), state("state", "k"),
            state("state", "v"), *BATCH]
    return [call("rope_append", refs, heads=heads, kv_heads=kv_heads, dim=dim, half=half, page=site.page,
                 eps=site.real("eps"), q_norm=site.has(3), k_norm=site.has(4), stride_q=site.stride(0),
                 stride_k=site.stride(1), stride_v=site.stride(2))]


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
    heads, dim = _heads(site, 0)
    site.stated("state")
    kv_heads = _appended_heads(site)
    if heads % kv_heads:
        raise site.fail(f"{heads} query heads over {kv_heads} kv heads", "the first must be a multiple of the second")
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim}
    reading = {**sizes, "page": site.page, "scale": site.real("scale"), "stride_q": site.stride(0)}
    gate = {"gate": site.has(1), "stride_g": site.stride(1) if site.has(1) else 0}
    rows, gates = site.capacity(site.float_type(0).shape) * heads, [site.ref(1)] if site.has(1) else []
    caches = [state("state", "k"), state("state", "v"), *BATCH]
    if not site.decode:
        total = scratch("total", rows * dim * 4)
        return [call("paged_attention", [site.ref(0), *gates, result(), total, *caches], **reading, **gate)]
    parts, stats = scratch("parts", rows * PARTS * dim * 4), scratch("stats", rows * PARTS * 2 * 4)
    spans = [ref for ref in BATCH if ref.name != "block_table"]
    return [call("attention_parts", [site.ref(0), parts, stats, *caches], **reading),
            call("attention_merge", [parts, stats, *gates, result(), *spans], **sizes, **gate)]


def delta_net(site: Site) -> list[Call]:
    """Two launches: convolution, gates and L2 norms; delta rule and gated norm."""
    site.stated("conv")
    site.stated("delta")
    spans = (*SPANS, Ref("input", name="into"))
    sizes = {name: site.integer(name) for name in ("key_heads", "value_heads", "key_dim", "value_dim")}
    qkv, taps = site.float_type(0), int(site.operand(4).type.shape[1])  # type: ignore[arg-type]
    tokens, channels = site.capacity(qkv.shape), inner(qkv.shape)
    mixed = scratch("mixed", tokens * channels * 4)
    gates = scratch("gates", tokens * 2 * sizes["value_heads"] * 4)
    weights = Ref("blob", index=4, layout="channels", part="w")
    conv = call("delta_conv", [site.ref(0), site.ref(2), site.ref(3), weights, site.ref(5), site.ref(6), state("conv"),
                               mixed, gates, *spans],
                **sizes, taps=taps, stride_x=site.stride(0), stride_b=site.stride(2), stride_a=site.stride(3))
    rule = call("delta_rule", [mixed, gates, site.ref(1), site.ref(7), state("delta"), result(), *spans],
                **sizes, eps=site.real("eps"), stride_z=site.stride(1), state=str(site.op.attrs.get("rounds") or "f32"))
    return [conv, rule]
