"""Lowering for plans of one token: products one warp a row, router and norms inside their readers, weights fetched ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Op
from qcn_compile.targets.base import Call, Kernel, Param, Ref
from qcn_compile.targets.triton.lowering.site import (
    COUNTS,
    Site,
    call,
    cdiv,
    inner,
    power,
    result,
    scratch,
    state,
)

LANES = 32
CONTEXT, SLOTS, TABLE = (Ref("input", name=n) for n in ("context_lens", "slots", "block_table"))
NEVER: dict[str, Param] = {"AHEAD": 0, "FROM": 0}
# How a launch is cut, by its role: R rows at once, one a warp, RW times; as measured on an H100 (tests/gpu/tune.py).
CHOICE: dict[str, dict[str, int]] = {
    "head": {"R": 8, "RW": 2}, "wide": {"R": 8, "RW": 2}, "out": {"R": 4, "RW": 1}, "narrow": {"R": 4, "RW": 1},
    "up": {"R": 4, "GROUPS": 2}, "down": {"R": 8, "RW": 1},
    "delta": {"BV": 32, "WARPS": 4},
    "attention": {"SPLITS": 32, "BS": 32, "WARPS": 8},
    # bytes of later weights that a launch asks for; 0: its own loads fill the memory
    "ahead": {"gemv_pair": 8 << 20, "gemv": 8 << 20, "delta_one": 4 << 20, "attention_one": 8 << 20, "route_up": 0,
              "route_down": 16 << 20},
}


def role(n: int, encoding: Encoding) -> str:
    """What a product of n rows is to the step."""
    return "head" if n > 65536 else "narrow" if encoding.format == "bf16" else "wide" if n > 4096 else "out"


def _form(encoding: Encoding) -> dict[str, Param]:
    return {"C": 16 if encoding.format == "fp8" else 8, "SCALED": encoding.format == "fp8", "W": encoding.format}


def gemv_shape(n: int, k: int, encoding: Encoding) -> dict[str, Param]:
    """The rows of a program, and the HOLD column tiles of each that wait in registers."""
    chosen = CHOICE[role(n, encoding)]
    warps, times = chosen["R"], chosen["RW"]
    tiles = cdiv(k, LANES * int(_form(encoding)["C"]))
    return {"R": warps, "RW": times, "HOLD": min(tiles, 16 // times), "WARPS": warps, "LANES": LANES * warps,
            **_form(encoding), **NEVER}


def gemv(site: Site, args: Sequence[Ref], weight: int, rows: dict[str, Param], **params: Param) -> Call:
    """One product with operand `weight`."""
    encoding, _ = site.matrix(weight)
    n, k = (int(d) for d in site.operand(weight).type.shape)  # type: ignore[arg-type]
    shape = gemv_shape(n, k, encoding)
    usual: dict[str, Param] = {"ADD": False, "BIAS": False, "ADDEND": False, "NORM": False, "HEAD": 0, "SPLITS": 1,
                               "EPS": 0.0, "R_TYPE": "bf16"}
    return call("gemv", args, (cdiv(n, int(shape["R"]) * int(shape["RW"])),), N=n, K=k, **{**usual, **params}, **rows,
                **shape)


def linear(site: Site) -> list[Call]:
    """linear(x, w, bias?) and linear_add(x, w, r)."""
    _, weight = site.matrix(1)
    add = site.op.name == "linear_add"
    bias = site.has(2) and not add
    args = [site.ref(0), *weight, *([site.ref(2)] if add or bias else []), result(), COUNTS]
    return [gemv(site, args, 1, site.rows(site.activation(0).shape), ADD=add, BIAS=bias, ADDEND=add or bias,
                 R_TYPE="f32" if bias else "bf16")]


def norm_linear(site: Site) -> list[Call]:
    """norm_linear(x, norm_w, w)."""
    _, weight = site.matrix(2)
    args = [site.ref(0), site.ref(1), *weight, result(), COUNTS]
    return [gemv(site, args, 2, site.rows(site.activation(0).shape), NORM=True, EPS=site.real("eps"))]


def norm_linear_pair(site: Site) -> list[Call]:
    """norm_linear_pair(x, norm_w, w, w2), w2 in bf16."""
    (encoding, weight), (other, second) = site.matrix(2), site.matrix(3)
    n, k = (int(d) for d in site.operand(2).type.shape)  # type: ignore[arg-type]
    n2 = int(site.operand(3).type.shape[0])  # type: ignore[arg-type]
    shape, small = gemv_shape(n, k, encoding), gemv_shape(n2, k, other)
    rows = int(shape["R"])
    return [call("gemv_pair", [site.ref(0), site.ref(1), *weight, *second, result(0), result(1), COUNTS],
                 (cdiv(n2, rows) + cdiv(n, rows * int(shape["RW"])),), N=n, N2=n2, K=k, C2=small["C"],
                 HOLD2=small["HOLD"], EPS=site.real("eps"), **shape)]


def delta_net_linear(site: Site) -> list[Call]:
    """The mixer split over value columns, then the projection that finishes the norm of its heads."""
    sizes: dict[str, Param] = {"HK": site.integer("key_heads"), "HV": site.integer("value_heads"),
                               "DK": site.integer("key_dim"), "DV": site.integer("value_dim")}
    hv, dk, dv = int(sizes["HV"]), int(sizes["DK"]), int(sizes["DV"])
    if power(dk) != dk or power(dv) != dv or dv < 16:
        raise site.fail(f"head sizes {dk} and {dv}", "the GPU kernels need powers of two, 16 at least")
    columns, warps = min(dv, CHOICE["delta"]["BV"]), CHOICE["delta"]["WARPS"]
    splits = dv // columns
    y, squares = scratch("y", hv * dv, "bf16"), scratch("squares", hv * splits, "f32")
    taps = int(site.operand(4).type.shape[1])  # type: ignore[arg-type]
    mixer = call("delta_one", [
        *(site.ref(i) for i in range(4)), Ref("blob", index=4, layout="channels", part="w"),
        *(site.ref(i) for i in (5, 6, 7)), state("conv"), state("delta"), y, squares, CONTEXT, SLOTS, COUNTS],
        (hv, splits), **sizes, BV=columns, TAPS=taps, RING=site.ring, WARPS=warps, LANES=LANES * warps, **NEVER)
    _, weight = site.matrix(9)
    add = site.has(10)
    args = [y, squares, *weight, *([site.ref(10)] if add else []), result(), COUNTS]
    return [mixer, gemv(site, args, 9, site.rows(site.activation(0).shape), ADD=add, ADDEND=add, HEAD=dv, SPLITS=splits,
                        EPS=site.real("eps"))]


def norm_route_experts(site: Site) -> list[Call]:
    """Gate and up rows of every expert of the token, then down rows."""
    if site.op.attrs["activation"] != "silu":
        raise site.fail(f"expert activation {site.op.attrs['activation']!r}", "only silu has a kernel")
    count, hidden, width = (int(d) for d in site.operand(4).type.shape)  # type: ignore[arg-type]
    (up_form, up), (down_form, down) = site.matrix(3), site.matrix(4)
    shared, top = bool(site.op.attrs["shared"]), site.integer("top_k")
    experts = count - int(shared)
    routing: dict[str, Param] = {"EXPERTS": experts, "BL": cdiv(power(experts, LANES), LANES), "TOP": top,
                                 "SHARED": int(shared), "H": hidden, "F": width, **NEVER}
    h = scratch("h", (top + int(shared)) * width, "bf16")
    add = site.has(5)
    groups, rows, wide, times = CHOICE["up"]["GROUPS"], CHOICE["up"]["R"], CHOICE["down"]["R"], CHOICE["down"]["RW"]
    return [
        call("route_up", [site.ref(0), site.ref(1), site.ref(2), *up, h, COUNTS], (cdiv(width, rows), groups),
             GROUPS=groups, R=rows, WARPS=rows, LANES=LANES * rows, EPS=site.real("eps"), **routing, **_form(up_form)),
        call("route_down", [h, site.ref(2), *down, *([site.ref(5)] if add else []), result(), COUNTS],
             (cdiv(hidden, wide * times),), R=wide, RW=times, WARPS=wide, LANES=LANES * wide, NORMALIZE=bool(site.op.attrs["normalize"]),
             ADD=add, **routing, **_form(down_form))]


def rope_attention(site: Site) -> list[Call]:
    """Norms, rotation, append and attention over stretches of the keys, then their combination and the gate."""
    heads, dim = (int(d) for d in site.activation(0).shape[1:])  # type: ignore[arg-type]
    kv_heads = int(site.activation(1).shape[1])  # type: ignore[arg-type]
    site.stated("state")
    if heads % kv_heads:
        raise site.fail(f"{heads} query heads over {kv_heads} kv heads", "the first must be a multiple of the second")
    splits, keys, warps = (CHOICE["attention"][n] for n in ("SPLITS", "BS", "WARPS"))
    part, score = scratch("part", heads * splits * dim, "f32"), scratch("score", heads * splits, "f32")
    norms = [site.ref(i) for i in (3, 4) if site.has(i)]
    gate = [site.ref(7)] if site.has(7) else []
    wide = power(dim, 16)
    return [
        call("attention_one", [site.ref(0), site.ref(1), site.ref(2), *norms, site.ref(5), site.ref(6), part, score,
                               state("state", "k"), state("state", "v"), CONTEXT, TABLE, COUNTS], (kv_heads, splits),
             HQ=heads, HKV=kv_heads, D=dim, BD=wide, BG=max(16, power(heads // kv_heads)),
             HALF=inner(site.operand(5).type.shape), PAGE=site.page, BS=keys, SPLITS=splits, EPS=site.real("eps"),
             SCALE=site.real("scale"), Q_NORM=site.has(3), K_NORM=site.has(4), WARPS=warps, LANES=LANES * warps, **NEVER),
        call("attention_combine", [part, score, *gate, result(), COUNTS], (1, heads), HQ=heads, D=dim, BD=wide,
             SPLITS=splits, SG=site.stride(7) if gate else 0, GATE=bool(gate), WARPS=4)]


def fetch_ahead(steps: Sequence[tuple[Op, Call]], packed: dict[int, int]) -> list[Call]:
    """Tell each launch which bytes of a later product's weights to ask for: in order, as many as its family may.
    `packed`: bytes of the codes of the product at a step."""
    calls = [call_ for _, call_ in steps]
    at, done = 0, 0
    for i, (_, launch) in enumerate(steps):
        budget = CHOICE["ahead"].get(launch.kernel.family, 0)
        if at <= i:
            at, done = _next(packed, i), 0
        if budget == 0 or at < 0:
            continue
        take = min(budget, packed[at] - done)
        calls[i] = _asking(launch, steps[at], take, done)
        done += take
        if done == packed[at]:
            at, done = _next(packed, at), 0
    return calls


def _next(packed: dict[int, int], after: int) -> int:
    return next((i for i in packed if i > after), -1)


def _asking(launch: Call, later: tuple[Op, Call], nbytes: int, start: int) -> Call:
    op, other = later
    weight = next(ref for ref in other.args if ref.kind == "blob" and ref.layout == "matrix" and ref.part == "w")
    params = {**dict(launch.kernel.params), "AHEAD": nbytes, "FROM": start}
    return replace(launch, kernel=Kernel.make(launch.kernel.family, **params),
                   args=(*launch.args, replace(weight, owner=op)))
