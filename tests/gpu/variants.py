"""Kernel variants at the sizes of Qwen3-Coder-Next, batch 1, to choose between by measurement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qcn_compile.targets.base import Kernel, Param

H, F, SLOTS, EXPERTS = 2048, 512, 11, 513


@dataclass(frozen=True)
class Variant:
    """A launch: kernel, grid, the bytes it has to move, and of which of its pointers are weights (rotated)."""

    what: str
    kernel: Kernel
    grid: tuple[int, ...]
    bytes: int
    label: str


def _label(kernel: Kernel, names: tuple[str, ...]) -> str:
    table = dict(kernel.params)
    return " ".join(f"{n}={table[n]}" for n in names if n in table)


def gemvs() -> Iterator[Variant]:
    """Projections in fp8, router and gates in bf16, output head."""
    shapes = [("in_proj", 12288, 2048, "fp8"), ("qkv", 9216, 2048, "fp8"), ("out_proj", 2048, 4096, "fp8"),
              ("router", 513, 2048, "bf16"), ("gates", 64, 2048, "bf16"), ("head", 151936, 2048, "fp8")]
    tiles = [(4, 512, 1), (2, 1024, 1), (4, 1024, 2), (2, 1024, 2), (4, 2048, 4), (8, 2048, 4), (16, 2048, 8),
             (1, 2048, 4), (1, 2048, 2), (2, 2048, 2), (8, 1024, 2), (2, 4096, 4), (4, 4096, 8)]
    for what, n, k, form in shapes:
        for norm in (False, True):
            for bn, bk, warps in tiles:
                if (what == "head" and (norm or bn != 4)) or (norm and bk != 2048) or (bk > 2048 and k < bk):
                    continue
                params: dict[str, Param] = {
                    "ROWS": -1, "TIMES": 1, "N": n, "K": k, "BN": bn, "BK": bk, "SX": k, "SR": 0, "ADD": False,
                    "BIAS": False, "ADDEND": False, "R": "bf16", "NORM": norm, "KEEP": norm and what == "router", "EPS": 1e-6, "SCALED": form == "fp8",
                    "W": form, "WARPS": warps}
                kernel = Kernel.make("gemv", **params)
                size = n * k * (1 if form == "fp8" else 2)
                yield Variant(what + (" norm" if norm else ""), kernel, (-(-n // bn), 1), size,
                              _label(kernel, ("BN", "BK", "WARPS")))


def experts() -> Iterator[Variant]:
    """gate/up and down of the 11 experts of one token."""
    kind: dict[str, Param] = {"W": "fp8", "SCALED": True, "SLOTS": SLOTS, "H": H, "F": F}
    for bf, bk, warps in ((2, 1024, 1), (2, 2048, 2), (2, 2048, 4), (4, 2048, 4), (8, 2048, 4), (8, 2048, 8),
                          (4, 1024, 2), (4, 1024, 4)):
        kernel = Kernel.make("moe_up", BF=bf, BK=bk, SX=H, WARPS=warps, **kind)
        yield Variant("moe_up", kernel, (F // bf, SLOTS, 1), SLOTS * 2 * F * H, _label(kernel, ("BF", "BK", "WARPS")))
    for bh, warps in ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8)):
        kernel = Kernel.make("moe_down", BH=bh, BF=512, BS=16, SR=H, ADD=True, WARPS=warps, **kind)
        yield Variant("moe_down", kernel, (H // bh, 1), SLOTS * F * H, _label(kernel, ("BH", "WARPS")))
    for warps in (1, 2, 4):
        kernel = Kernel.make("moe_route", EXPERTS=512, BE=512, TOP=10, SLOTS=11, BS=16, SX=513, NORMALIZE=True,
                             SHARED=True, WARPS=warps)
        yield Variant("moe_route", kernel, (1,), 1026, _label(kernel, ("WARPS",)))


def mixers() -> Iterator[Variant]:
    """DeltaNet step, norms, attention at 1024 tokens of context."""
    for warps in (4, 8, 16):
        kernel = Kernel.make("delta_step", HK=16, HV=32, DK=128, DV=128, TAPS=4, RING=16, SX=12288, SZ=12288, SB=64,
                             SA=64, EPS=1e-6, WARPS=warps)
        yield Variant("delta_step", kernel, (32, 1), 2 * 32 * 128 * 128 * 4, _label(kernel, ("WARPS",)))
        one = Kernel.make("delta_one", HK=16, HV=32, DK=128, DV=128, TAPS=4, RING=16, EPS=1e-6, WARPS=warps)
        yield Variant("delta_one", one, (32,), 2 * 32 * 128 * 128 * 4, _label(one, ("WARPS",)))
    for warps in (1, 4):
        kernel = Kernel.make("rms_norm", ROWS=0, TIMES=1, HEADS=1, D=H, BD=H, SX=H, SR=0, SZ=0, EPS=1e-6, ADD=False,
                             GATE=False, WARPS=warps)
        yield Variant("rms_norm", kernel, (1,), 4 * H, _label(kernel, ("WARPS",)))
    for splits, keys, warps in ((32, 32, 4), (16, 64, 4), (32, 64, 4), (32, 32, 2), (64, 16, 4), (64, 32, 4)):
        kernel = Kernel.make("attention_split", HQ=16, HKV=2, D=256, BD=256, BG=16, PAGE=32, BS=keys, SPLITS=splits,
                             SQ=4096, SCALE=0.0625, WARPS=warps, STAGES=2)
        yield Variant("attention_split", kernel, (1, 2, splits), 1024 * 2048, _label(kernel, ("SPLITS", "BS", "WARPS")))
    for splits in (16, 32, 64):
        kernel = Kernel.make("attention_combine", HQ=16, D=256, BD=256, SPLITS=splits, SG=4096, GATE=True, WARPS=4)
        yield Variant("attention_combine", kernel, (1, 16), splits * 16 * 1024, _label(kernel, ("SPLITS",)))


def variants() -> list[Variant]:
    """All of them."""
    return [*gemvs(), *experts(), *mixers()]
