"""Cases of every kernel family, at tiny and odd sizes, for the interpreter and for a card."""

from __future__ import annotations

from harness_gpu import (
    BF16,
    DECODE_1,
    DECODE_4,
    DECODE_8,
    DECODE_64,
    FP8,
    INT4,
    LONG,
    NVFP4,
    PREFILL,
    WIDE,
    Case,
    Ragged,
)

from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Value
from qcn_compile.ir.types import DType, StateKind
from qcn_compile.targets.base import Bucket

Trialled = tuple[Case, list[Ragged]]
ONE, FEW, MANY = [Ragged((1,))], [Ragged((3,)), Ragged((8,))], [Ragged((13,)), Ragged((40,))]
BATCHES = {
    "decode-1": [Ragged((1,)), Ragged((1,), (40,))],
    "decode-4": [Ragged((1, 1, 1), (0, 31, 70)), Ragged((4,), (17,))],
    "decode-8": [Ragged((1, 1, 1), (0, 31, 70)), Ragged((5, 1), (33, 2)), Ragged((8,), (17,))],
    "decode-64": [Ragged((1,) * 12, (*range(10), 15, 40)), Ragged((17, 1, 30), (5, 0, 100))],
    "prefill-192": [Ragged((70, 1, 90), (0, 5, 100)), Ragged((64, 63, 65), (1, 0, 2)), Ragged((130,), (33,))],
    "prefill-64": [Ragged((5,)), Ragged((33, 1, 20), (0, 100, 31)), Ragged((1, 1, 4, 2), (15, 16, 0, 63))],
}

ALONE = [*BATCHES["decode-1"], Ragged((1,), (300,)), Ragged((1,), (31,))]


def batches(bucket: Bucket) -> list[Ragged]:
    """Plain token counts for ops that know no sequences."""
    return ONE if bucket is DECODE_1 else FEW[:1] if bucket is DECODE_4 else FEW if bucket is DECODE_8 else MANY


def pointwise() -> list[Trialled]:
    norm = Case("rms_norm")
    norm.op("rms_norm", [norm.input("x", "bf16[T,3,20]", more=4), norm.weight("w", (20,), scale=1.0)], eps=1e-6)
    both = Case("add_rms_norm")
    both.op("add_rms_norm", [both.input("x", "bf16[T,48]"), both.input("r", "bf16[T,48]", more=8),
                             both.weight("w", (48,), scale=1.0)], eps=1e-6)
    gated = Case("gated_rms_norm")
    gated.op("gated_rms_norm", [gated.input("x", "bf16[T,2,16]"), gated.input("z", "bf16[T,2,16]", more=16),
                                gated.weight("w", (16,), scale=1.0)], eps=1e-6)
    chain = Case("pointwise")
    x, y = chain.input("x", "bf16[T,70]", more=2), chain.input("y", "bf16[T,70]")
    for name in ("sigmoid", "silu", "neg"):
        x = chain.op(name, [x])
    for name in ("add", "mul", "silu_mul"):
        x = chain.op(name, [x, y])
    x = chain.op("mul_sigmoid", [x, chain.input("g", "bf16[T,1]")])
    chain.op("concat", [x, y], axis=1)
    ends = Case("embedding and gather")
    table = ends.op("embedding", [ends.input("ids", "i32[T]", ints=(0, 30)), ends.weight("table", (30, 24), BF16)])
    ends.op("gather_rows", [table, ends.input("rows", "i32[R]", ints=(0, "T"))])
    return [(norm, MANY), (both, MANY), (gated, MANY), (chain, MANY[:1]), (ends, [Ragged((13,), rows=4)])]


def linear(bucket: Bucket, encoding: Encoding, n: int, k: int, add: bool) -> Trialled:
    case = Case(f"linear{'_add' * add} {encoding.format} [{n}, {k}] {bucket.name}", bucket)
    x, w = case.input("x", f"bf16[T,{k}]", more=16), case.weight("w", (n, k), encoding)
    case.op("linear_add" if add else "linear", [x, w, *([case.input("r", f"bf16[T,{n}]", more=8)] if add else [])])
    return case, batches(bucket)


def linears() -> list[Trialled]:
    bias = Case("linear with bias", DECODE_1)
    bias.op("linear", [bias.input("x", "bf16[T,48]"), bias.weight("w", (24, 48), BF16), bias.weight("b", (24,))])
    shapes = [(20, 48, False), (130, 192, True)]
    tiled = [(linear(bucket, encoding, n, 192, True)[0], [Ragged((150,))]) for encoding in (BF16, FP8)
             for bucket, n in ((LONG, 130), (WIDE, 1100))]
    buckets = (DECODE_1, DECODE_4, DECODE_8, PREFILL)
    side = [linear(DECODE_8, encoding, 130, 1024, encoding is FP8) for encoding in (BF16, FP8)]
    return [(bias, ONE), *tiled, *side, *(linear(bucket, encoding, *shape) for bucket in buckets
                           for encoding in (BF16, FP8) for shape in shapes)]


def fused() -> list[Trialled]:
    found = []
    for encoding in (BF16, FP8):
        one = Case(f"norm_linear {encoding.format}", DECODE_1)
        x, norm = one.input("x", "bf16[T,200]", more=8), one.weight("norm", (200,), scale=1.0)
        one.op("norm_linear", [x, norm, one.weight("w", (130, 200), encoding)], eps=1e-6, keep=encoding is BF16)
        two = Case(f"norm_linear_pair {encoding.format}", DECODE_1)
        x, norm = two.input("x", "bf16[T,200]", more=8), two.weight("norm", (200,), scale=1.0)
        two.op("norm_linear_pair", [x, norm, two.weight("w", (130, 200), encoding), two.weight("v", (7, 200), BF16)],
               eps=1e-6)
        found += [(one, ONE), (two, ONE)]
    return found


def routes() -> list[Trialled]:
    found = []
    for experts, top, normalize, shared in ((8, 2, True, False), (33, 3, False, True), (64, 10, True, True)):
        case = Case(f"route {experts} {top} {normalize} {shared}")
        case.op("moe_route", [case.input("logits", f"bf16[T,{experts + shared}]", more=3, scale=3.0)], top_k=top,
                normalize=normalize, shared=shared)
        found.append((case, MANY[:1]))
    return found


def parts() -> list[Trialled]:
    """What one rank of several looks up and routes."""
    table = Case("part of an embedding")
    table.op("embedding", [table.input("ids", "i32[T]", ints=(0, 30)), table.weight("table", (10, 24), BF16)], first=20)
    found = [(table, MANY)]
    for shared, group in ((-1, 0), (12, 0), (12, 1)):
        case = Case(f"local experts {shared} {group}")
        ids = case.input("ids", "i32[T,3]", ints=(0, 13))
        case.op("local_experts", [ids, case.input("weights", "f32[T,3]")], first=6 * group, count=6, shared=shared,
                group=group, groups=2)
        found.append((case, MANY))
    return found


def experts(name: str, bucket: Bucket, encoding: Encoding, count: int, hidden: int, inner: int, top: int,
            skewed: bool = False) -> Trialled:
    """With `skewed`, all tokens go to the same few experts and none to the others."""
    case = Case(f"{name} {encoding.format} {count} {hidden} {inner} {bucket.name}{' skewed' * skewed}", bucket)
    shared = name == "moe_add"
    logits = case.input("logits", f"bf16[T,{count}]", scale=0.1 if skewed else 2.0)
    if skewed:
        logits = case.op("add", [logits, case.weight("bias", (count,), scale=4.0)])
    ids, weights = case.op("moe_route", [logits], top_k=top,
                           normalize=True, shared=shared)
    operands: list[Value | None] = [case.input("x", f"bf16[T,{hidden}]", more=16), ids, weights,
                                    case.weight("gate_up", (count, 2 * inner, hidden), encoding),
                                    case.weight("down", (count, hidden, inner), encoding)]
    case.op(name, [*operands, case.input("r", f"bf16[T,{hidden}]", more=8)] if shared else operands, activation="silu")
    if encoding is FP8 and bucket not in (DECODE_1, DECODE_4):  # silu(gate) * up is rounded to e4m3 too: 2.6 % rms
        case.tolerance = 0.035
    return case, batches(bucket)


def moes() -> list[Trialled]:
    small = [experts("moe_add", bucket, encoding, 6, 136, 24, 2)
             for bucket in (DECODE_1, DECODE_4, DECODE_8, PREFILL) for encoding in (BF16, FP8, NVFP4, INT4)]
    return [*((case, batches[:1]) for case, batches in small), experts("moe_experts", PREFILL, BF16, 9, 48, 128, 2),
            experts("moe_experts", DECODE_1, FP8, 12, 264, 520, 9),
            *(experts("moe_experts", DECODE_1, encoding, 12, 264, 520, 9) for encoding in (NVFP4, INT4)),
            experts("moe_experts", PREFILL, NVFP4, 40, 136, 130, 2),
            experts("moe_experts", PREFILL, FP8, 40, 32, 128, 2, True),
            experts("moe_add", WIDE, BF16, 70, 32, 40, 3, True),
            *(experts("moe_add", WIDE, encoding, 12, 48, 130, 8) for encoding in (BF16, FP8, NVFP4, INT4))]


def deltas() -> list[Trialled]:
    found = []
    for bucket, (hk, hv, dk, dv) in ((DECODE_1, (2, 4, 16, 32)), (DECODE_4, (2, 4, 16, 16)), (DECODE_8, (2, 4, 16, 16)),
                                     (DECODE_64, (2, 4, 16, 16)), (PREFILL, (1, 3, 16, 32)), (LONG, (2, 4, 16, 64))):
        case = Case(f"delta_net {hk} {hv} {dk} {dv} {bucket.name}", bucket)
        _delta(case, hk, hv, dk, dv, "delta_net")
        if bucket is LONG:  # operands of the chunks' products are bf16: a chain of five roundings
            case.tolerance = 0.01
        found.append((case, BATCHES[bucket.name]))
        if bucket is not LONG:
            narrow = Case(f"delta_net in bf16{' to other slots' * (bucket is not DECODE_1)} {bucket.name}", bucket,
                          tolerance=0.02, moves=bucket is not DECODE_1)  # the reference rounds after every token
            _delta(narrow, hk, hv, dk, dv, "delta_net", DType.bf16)
            found.append((narrow, BATCHES[bucket.name]))
    return found


def _delta(case: Case, hk: int, hv: int, dk: int, dv: int, name: str, state: DType = DType.f32) -> None:
    channels = 2 * hk * dk + hv * dv
    conv = case.state("conv", StateKind.conv, DType.bf16, (channels, 3))
    delta = case.state("delta", StateKind.delta, state, (hv, dk, dv))
    operands = [case.input("qkv", f"bf16[T,{channels}]", more=16), case.input("z", f"bf16[T,{hv * dv}]", more=16),
                case.input("b", f"bf16[T,{hv}]", more=1), case.input("a", f"bf16[T,{hv}]", more=3),
                case.weight("conv_w", (channels, 4), scale=0.5), case.weight("decay", (hv,), scale=-0.3),
                case.weight("dt_bias", (hv,)), case.weight("norm_w", (dv,), scale=1.0), case.batch]
    case.op(name, operands, key_heads=hk, value_heads=hv, key_dim=dk, value_dim=dv, eps=1e-6, conv=conv, delta=delta,
            **({} if state is DType.f32 else {"rounds": state.value}))


def narrows() -> list[Trialled]:
    """Makers that round to e4m3 themselves, and products that read it. Where the maker's result differs in the last bit
    of bf16, a code may be the next one."""
    first = Case("narrow norm, product, experts", PREFILL, tolerance=0.035)
    x = first.input("x", "bf16[T,384]", more=8)
    _, codes, scales = first.op("narrow_rms_norm", [x, first.weight("norm", (384,), scale=1.0)], eps=1e-6)
    first.op("narrow_linear", [codes, scales, first.weight("w", (130, 384), FP8), first.input("r", "bf16[T,130]")])
    ids, weights = first.op("moe_route", [first.input("logits", "bf16[T,9]", scale=2.0)], top_k=2, normalize=True,
                            shared=False)
    first.op("narrow_experts", [codes, scales, ids, weights, first.weight("up", (9, 128, 384), FP8),
                                first.weight("down", (9, 384, 64), FP8), x], activation="silu")
    few = Case("narrow norm, product of stretches", DECODE_8, tolerance=0.035)
    _, codes, scales = few.op("narrow_rms_norm", [few.input("x", "bf16[T,512]"), few.weight("norm", (512,), scale=1.0)],
                              eps=1e-6)
    few.op("narrow_linear", [codes, scales, few.weight("w", (130, 512), FP8), few.input("r", "bf16[T,130]")])
    second = Case("narrow delta_net", PREFILL, tolerance=0.03)
    _delta(second, 1, 2, 16, 128, "narrow_delta_net")
    return [(first, MANY), (few, FEW), (second, BATCHES["prefill-64"])]


def attentions() -> list[Trialled]:
    table = Case("rope_table")
    table.op("rope_table", [table.input("positions", "i32[T]", ints=(0, 5000)), table.weight("f", (9,), scale=1.0)],
             scaling=1.25)
    found = [(table, MANY[:1])]
    sizes = ((DECODE_1, (4, 2, 32, 4, True, True)), (DECODE_1, (3, 3, 24, 5, False, False)),
             (DECODE_8, (6, 1, 16, 8, False, False)), (DECODE_8, (4, 2, 32, 4, True, True)),
             (PREFILL, (4, 2, 32, 4, True, True)), (PREFILL, (3, 3, 24, 5, True, False)),
             (DECODE_64, (4, 2, 32, 4, True, True)), (LONG, (8, 1, 16, 4, True, True)))
    stored = [*((DType.bf16, *size) for size in sizes), *((DType.f8e4m3, *sizes[i]) for i in (0, 3, 4))]
    for dtype, bucket, (hq, hkv, dim, half, norms, gate) in stored:
        narrow = dtype is DType.f8e4m3
        # with e4m3 a value between two codes may take either; more keys share the weight, so that bf16 queries show
        case = Case(f"attention {hq}/{hkv} of {dim} {'fp8 cache ' * narrow}{bucket.name}", bucket,
                    tolerance=0.05 if narrow else 0.01 if bucket is LONG else 6e-3)
        _attention(case, dtype, hq, hkv, dim, half, norms, gate)
        found.append((case, ALONE if bucket is DECODE_1 else
                      [Ragged((40, 1, 30), (0, 5, 100))] if bucket is LONG else BATCHES[bucket.name]))
    return found


def _attention(case: Case, dtype: DType, hq: int, hkv: int, dim: int, half: int, norms: bool, gate: bool) -> None:
    kv = case.state("kv", StateKind.kv, dtype, (hkv, dim))
    scale = 1.0 if norms else 0.5  # without norms a few scores compete, and bf16 queries decide between them
    q, k, v = (case.input(n, f"bf16[T,{h},{dim}]", more=8, scale=scale)
               for n, h in (("q", hq), ("k", hkv), ("v", hkv)))
    norm = [case.weight("q_w", (dim,), scale=1.0), case.weight("k_w", (dim,), scale=1.0)] if norms else [None, None]
    cos, sin = case.input("cos", f"f32[T,{half}]"), case.input("sin", f"f32[T,{half}]")
    g = case.input("g", f"bf16[T,{hq * dim}]", more=8) if gate else None
    more = {"state": kv, **({"stored": dtype.value} if dtype is DType.f8e4m3 else {})}
    if case.bucket is DECODE_1:
        case.op("rope_attention", [q, k, v, *norm, cos, sin, g, case.batch], eps=1e-6, scale=dim ** -0.5, **more)
    else:
        query = case.op("rope_append", [q, k, v, *norm, cos, sin, case.batch], eps=1e-6, **more)
        case.op("paged_attention", [query, g, case.batch], scale=dim ** -0.5, **more)


def every() -> list[Trialled]:
    """All cases."""
    return [*pointwise(), *linears(), *fused(), *routes(), *parts(), *moes(), *deltas(), *attentions(), *narrows()]
