"""Lowering for plans of one token: norms, rotation and cache append inside their readers."""

from __future__ import annotations

from collections.abc import Sequence

from qcn_compile.ir.encoding import Encoding
from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.triton.choices import Cut, varied
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, cdiv, inner, power, result, scratch, state

HOLD = 4  # column tiles of a row that wait in registers
WIDTH = 8  # elements of a lane, see kernels/single.py
CONTEXT, TABLE = (Ref("input", name=n) for n in ("context_lens", "block_table"))


def role(n: int, encoding: Encoding) -> str:
    """What a product of n rows is to the step."""
    return "head" if n > 65536 else "narrow" if encoding.format == "bf16" else "wide" if n > 4096 else "out"


def _form(encoding: Encoding) -> dict[str, Param]:
    return {"SCALED": encoding.format == "fp8", "W": encoding.format}


def _cut(chosen: Cut) -> dict[str, Param]:
    """Lanes, groups of rows, rows of a group, warps."""
    return {"L": chosen["L"], "RG": 32 * chosen["WARPS"] // chosen["L"], "RW": chosen["RW"], "WARPS": chosen["WARPS"],
            **registers(chosen)}


def registers(chosen: Cut) -> dict[str, Param]:
    """A cap for each thread where there is one. With one, ptxas uses what it allows to ask for more at a time."""
    return {"REGISTERS": chosen["REGISTERS"]} if "REGISTERS" in chosen else {}


def shared_expert(site: Site) -> int:
    """The expert that every token takes in its last slot; -1 where that is not known."""
    maker = site.op.operands[1].op if site.op.operands[1] is not None else None
    known = maker is not None and maker.name == "moe_route" and bool(maker.attrs["shared"])
    return int(site.operand(3).type.shape[0]) - 1 if known else -1  # type: ignore[arg-type]


def _tiled(family: str, args: Sequence[Ref], n: int, k: int, cut: Cut, fixed: dict[str, Param],
           before: int = 0) -> Call:
    """A product of n rows of k columns; `before` rows of another come first, one a group."""
    groups, rows = 32 * cut["WARPS"] // cut["L"], cut["RW"]
    return call(family, args, (cdiv(before, groups) + cdiv(n, groups * rows),), **fixed, **_cut(cut),
                HOLD=min(HOLD, cdiv(k, cut["L"] * WIDTH)))


def product(site: Site, args: Sequence[Ref], weight: int, **params: Param) -> Call:
    """One product with operand `weight`."""
    encoding, _ = site.matrix(weight)
    n, k = (int(d) for d in site.operand(weight).type.shape)  # type: ignore[arg-type]
    usual: dict[str, Param] = {"ADD": False, "BIAS": False, "ADDEND": False, "NORM": False, "KEEP": False, "EPS": 0.0,
                               "R": "bf16"}
    fixed: dict[str, Param] = {"N": n, "K": k, **usual, **params, **_form(encoding)}
    return varied(site.cuts, role(n, encoding), lambda cut: _tiled("product", args, n, k, cut, fixed))


def linear(site: Site) -> list[Call]:
    """linear(x, w, bias?) and linear_add(x, w, r)."""
    _, weight = site.matrix(1)
    add = site.op.name == "linear_add"
    bias = site.has(2) and not add
    args = [site.ref(0), *weight, *([site.ref(2)] if add or bias else []), result()]
    return [product(site, args, 1, ADD=add, BIAS=bias, ADDEND=add or bias, R="f32" if bias else "bf16")]


def norm_linear(site: Site) -> list[Call]:
    """norm_linear(x, norm_w, w), which may keep the normed x."""
    _, weight = site.matrix(2)
    keep = bool(site.op.attrs["keep"])
    args = [site.ref(0), site.ref(1), *weight, *([result(1)] if keep else []), result(0)]
    return [product(site, args, 2, NORM=True, KEEP=keep, EPS=site.real("eps"))]


def norm_linear_pair(site: Site) -> list[Call]:
    """norm_linear_pair(x, norm_w, w, w2), w2 in bf16."""
    (encoding, weight), (_, second) = site.matrix(2), site.matrix(3)
    n, k = (int(d) for d in site.operand(2).type.shape)  # type: ignore[arg-type]
    n2 = int(site.operand(3).type.shape[0])  # type: ignore[arg-type]
    args = [site.ref(0), site.ref(1), *weight, *second, result(0), result(1)]
    fixed: dict[str, Param] = {"N": n, "N2": n2, "K": k, "EPS": site.real("eps"), **_form(encoding)}
    return [varied(site.cuts, "wide", lambda cut: _tiled("product_pair", args, n, k, cut, fixed, n2))]


def experts(site: Site) -> list[Call]:
    """moe_experts(x, ids, weights, gate_up, down) and moe_add with r after them."""
    _, hidden, width = (int(d) for d in site.operand(4).type.shape)  # type: ignore[arg-type]
    (up_form, up), (down_form, down) = site.matrix(3), site.matrix(4)
    slots = int(site.operand(1).type.shape[1])  # type: ignore[arg-type]
    ids, weights = Ref("operand", index=1), Ref("operand", index=2)
    h, add, shared = scratch("h", slots * width, "bf16"), site.op.name == "moe_add", shared_expert(site)
    above = [site.ref(0), ids, *up, h]
    below = [h, ids, weights, *down, *([site.ref(5)] if add else []), result()]
    return [
        varied(site.cuts, "up", lambda cut: call(
            "up_one", above, (cdiv(width, 32 * cut["WARPS"] // cut["L"] * cut["RW"]), slots), H=hidden, F=width,
            SLOTS=slots, SHARED=shared, **_cut(cut), **_form(up_form))),
        varied(site.cuts, "down", lambda cut: call(
            "down_one", below, (cdiv(hidden, cut["RW"]),), SLOTS=slots, H=hidden, F=width, ADD=add, **_cut(cut),
            **_form(down_form)))]


def rope_attention(site: Site) -> list[Call]:
    """Norms, rotation, append and attention over stretches of the keys, then their combination and the gate."""
    heads, dim = (int(d) for d in site.activation(0).shape[1:])  # type: ignore[arg-type]
    kv_heads = int(site.activation(1).shape[1])  # type: ignore[arg-type]
    site.stated("state")
    if heads % kv_heads:
        raise site.fail(f"{heads} query heads over {kv_heads} kv heads", "the first must be a multiple of the second")
    most = max(cut["SPLITS"] for cut in site.cuts["attention"])
    part, score = scratch("part", heads * most * dim, "f32"), scratch("score", heads * most, "f32")
    norms = [site.ref(i) for i in (3, 4) if site.has(i)]
    gate = [site.ref(7)] if site.has(7) else []
    wide = power(dim, 16)
    taken = [site.ref(0), site.ref(1), site.ref(2), *norms, site.ref(5), site.ref(6), part, score, state("state", "k"),
             state("state", "v"), CONTEXT, TABLE]
    return [
        varied(site.cuts, "attention", lambda cut: call(
            "attention_one", taken, (kv_heads, cut["SPLITS"]), HQ=heads, HKV=kv_heads, D=dim, BD=wide,
            BG=max(16, power(heads // kv_heads)), HALF=inner(site.operand(5).type.shape), PAGE=site.page,
            EPS=site.real("eps"), SCALE=site.real("scale"), Q_NORM=site.has(3), K_NORM=site.has(4), KV=site.cached,
            **cut)),
        varied(site.cuts, "attention", lambda cut: call(
            "attention_combine", [part, score, *gate, result(), COUNTS], (1, heads), HQ=heads, D=dim, BD=wide,
            SPLITS=cut["SPLITS"], SG=site.stride(7) if gate else 0, GATE=bool(gate), WARPS=8))]
